"""The terminal conversation, with a scripted engine."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from support.tiny_models import tiny_image, tiny_vlm
from unclipped.core.errors import ImageError, UsageError
from unclipped.data.sample import Sample
from unclipped.images.config import ImageRule
from unclipped.inference.chat import chat, printable
from unclipped.inference.engine import Engine


class Scripted(Engine):
    """Answers with the number of turns and images it sees."""

    image_rule = ImageRule()  # type: ignore[assignment]

    def __init__(self) -> None:
        self.asked: list[Sample] = []

    def stream(self, request: Any, *, max_new_tokens: int = 256) -> Iterator[str]:
        self.asked.append(request)
        if request.question == "interrupt":
            yield "half"
            raise KeyboardInterrupt
        yield f"{len(request.turns)} turns, "
        yield f"{len(request.images)} images [b]"


def run(engine: Engine, *lines: str, images: tuple = (), question: str | None = None) -> tuple[str, str]:
    out = io.StringIO()
    supply = iter(lines)

    def read() -> str:
        try:
            return next(supply)
        except StopIteration:
            raise EOFError from None

    answer = chat(engine, images, question, Console(file=out, width=200), read=read)
    return answer, out.getvalue()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    tiny_image().save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_one_question(picture: Path) -> None:
    answer, shown = run(Scripted(), images=(picture, picture), question="what?")
    assert answer == "1 turns, 2 images [b]"
    assert shown == answer + "\n"


def test_conversation_keeps_turns_and_adds_images(picture: Path) -> None:
    engine = Scripted()
    answer, shown = run(engine, "first", f"/image {picture}", "second", "/quit", "never", images=(picture,))
    assert answer == "3 turns, 2 images [b]"
    assert [turn.role for turn in engine.asked[1].turns] == ["user", "assistant", "user"]
    assert engine.asked[1].turns[1].text == "1 turns, 1 images [b]"
    assert len(engine.asked) == 2
    assert "/image PATH" in shown


def test_clear_forgets(picture: Path) -> None:
    engine = Scripted()
    run(engine, "first", "/clear", "second", images=(picture,))
    assert len(engine.asked[1].turns) == 1
    assert engine.asked[1].images == ()


def test_mistakes_do_not_end_a_conversation(tmp_path: Path) -> None:
    engine = Scripted()
    answer, shown = run(engine, f"/image {tmp_path / 'none.png'}", "/imag x", "", "still here?")
    assert answer == "1 turns, 0 images [b]"
    assert "none.png" in shown
    assert "not a command" in shown


def test_an_interrupted_answer_is_not_kept() -> None:
    engine = Scripted()
    run(engine, "interrupt", "next")
    assert len(engine.asked[1].turns) == 1


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="question is empty"):
        run(Scripted(), question=" ")
    with pytest.raises(ImageError, match=r"none\.png"):
        run(Scripted(), images=(tmp_path / "none.png",), question="what?")


def test_a_real_model_answers(tmp_path: Path, picture: Path) -> None:
    tiny_vlm(tmp_path, output=tmp_path / "vlm")
    answer, shown = run(Engine(tmp_path / "vlm", device="cpu"), images=(picture,), question="what is this?")
    assert shown.rstrip("\n") == printable(answer).rstrip("\n")


def test_answers_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\x07b\r\n\tc\x9b") == "a[2Jb\n\tc"


@pytest.mark.parametrize("question", [b"colour \xff?".decode("utf-8", "surrogateescape"), "cut emoji \ud83d"])
def test_a_question_that_is_no_text_is_refused_before_the_model_loads(question):
    with pytest.raises(UsageError, match=r"chat: -q: the text holds half of a surrogate pair") as caught:
        chat("no-such-model", [], question)
    str(caught.value).encode()


def test_a_typed_line_that_is_no_text_does_not_end_the_conversation():
    lines = iter([b"\xff", b"/quit"])
    out = io.StringIO()
    console = Console(file=out)
    chat(Scripted(), [], console=console, read=lambda: next(lines).decode())
    assert "not UTF-8" in out.getvalue()
