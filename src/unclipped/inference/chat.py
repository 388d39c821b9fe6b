"""Ask a model about images on the terminal: one question, or a conversation."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from unclipped.attention.config import SparseConfig
from unclipped.core.documents import check_text
from unclipped.core.errors import UnclippedError, UsageError
from unclipped.data.sample import ImagePart, Sample, TextPart, Turn
from unclipped.inference.engine import Engine

HELP = "/image PATH adds an image to the next question, /clear starts anew, /quit ends"


def printable(text: str) -> str:
    """`text` without control characters other than line ends and tabs: an answer must not steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


class Conversation:
    """Turns so far and the images waiting for the next question."""

    def __init__(self, engine: Engine, images: Sequence[str | Path] = ()) -> None:
        self.engine = engine
        self.turns: list[Turn] = []
        self.waiting: list[ImagePart] = []
        for image in images:
            self.add_image(image)

    def add_image(self, path: str | Path) -> None:
        """Put an image before the next question. Raises ImageError when it cannot be read."""
        from unclipped.images.prepare import decoded

        path = os.path.expanduser(path)  # not a Path, which would take a slash from an address and make it unknown
        # Decoded now, so that a wrong path is said at once and the file may change later; by the model's own rule.
        self.waiting.append(ImagePart(decoded(ImagePart(path), self.engine.image_rule), name=path))

    def clear(self) -> None:
        """Forget all turns and waiting images."""
        self.turns, self.waiting = [], []

    def ask(self, question: str, *, max_new_tokens: int, write: Callable[[str], None]) -> str:
        """Answer a question about the waiting images and all earlier turns, piece by piece through `write`.

        The exchange is kept only when the answer came to its end, so an interrupted one can be asked again.
        """
        turn = Turn("user", (*self.waiting, TextPart(question)))
        pieces = []
        sample = Sample("conversation", (*self.turns, turn))
        for piece in self.engine.stream(sample, max_new_tokens=max_new_tokens):
            pieces.append(piece)
            write(piece)
        answer = "".join(pieces)
        self.turns += [turn, Turn("assistant", (TextPart(answer),))]
        self.waiting = []
        return answer


def chat(
    model: str | Path | Engine,
    images: Sequence[str | Path] = (),
    question: str | None = None,
    console: Console | None = None,
    *,
    max_new_tokens: int = 256,
    device: str = "auto",
    sparse: SparseConfig | None = None,
    read: Callable[[], str] | None = None,
) -> str:
    """Answer `question` about `images` and return the answer, or hold a conversation and return its last answer.

    sparse: prefill under this pattern (an Engine keeps its own). read: gives the next line typed and raises EOFError at
    the end; the terminal by default. Raises ImageError for an unreadable image and UsageError for an empty question.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if question is not None and not question.strip():
        raise UsageError("chat: the question is empty; give one with -q, or leave -q out for a conversation")
    check_text(question or "", "chat: -q", UsageError)
    engine = model if isinstance(model, Engine) else Engine(model, device=device, sparse=sparse)
    conversation = Conversation(engine, images)

    def write(piece: str) -> None:
        console.print(printable(piece), end="", markup=False, soft_wrap=True)

    if question is not None:
        answer = conversation.ask(question, max_new_tokens=max_new_tokens, write=write)
        console.print()
        _tell_sparse(engine, console)
        return answer
    console.print(f"{len(images)} image(s). {HELP}.", markup=False)
    read = read or (lambda: console.input("> "))
    answer = ""
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return answer
        except UnicodeDecodeError:
            console.print("the line is not UTF-8 text; type it again", markup=False)
            continue
        if line == "/quit":
            return answer
        try:
            if line.startswith("/"):
                _command(line, conversation, console)
            elif line:
                answer = conversation.ask(line, max_new_tokens=max_new_tokens, write=write)
                console.print()
                _tell_sparse(engine, console)
        except KeyboardInterrupt:
            console.print("\n(stopped; the question is not kept)", markup=False)
        except UnclippedError as error:  # a wrong path must not end a conversation
            console.print(str(error), markup=False)


def _tell_sparse(engine: Engine, console: Console) -> None:
    """One line about the last prefill, when the engine has a pattern."""
    summary = engine.sparse.summary() if engine.sparse is not None else None
    if summary is not None:
        why = f"; dense because {', '.join(summary.reasons)}" if summary.reasons else ""
        console.print(
            f"(prefill: {summary.sparse_layers} of {summary.layers} layers sparse, density {summary.density:.2f}{why})",
            markup=False,
        )


def _command(line: str, conversation: Conversation, console: Console) -> None:
    name, _, argument = line.partition(" ")
    if name == "/clear":
        conversation.clear()
        console.print("(starting anew)", markup=False)
    elif name == "/image" and argument.strip():
        conversation.add_image(argument.strip())
        console.print(f"({len(conversation.waiting)} image(s) with the next question)", markup=False)
    else:
        raise UsageError(f"{line}: not a command; {HELP}")
