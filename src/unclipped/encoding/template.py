"""What a chat template makes of a structure of turns, learned by rendering it once with marks in place of every text.

Rendering with marks, and not with the texts themselves, is what lets labels be built instead of searched for: the
places of answers are known exactly, whatever the texts say. A mark stands between em spaces, so that a template that
trims its contents gives itself away and the texts are trimmed as it would.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from unclipped.core.bounded import rendered
from unclipped.core.errors import CheckpointError, DataError, UnclippedError, UsageError, first_line
from unclipped.data.sample import Sample, TextPart, Turn

_EDGE = "\u2003"  # white space that no template writes itself
_OPEN, _CLOSE = "\u27ea", "\u27eb"
_MARK = re.compile(f"({_EDGE}?){_OPEN}(\\d+)\\.(\\d+){_CLOSE}({_EDGE}?)")

Structure = tuple[tuple[str, str], ...]
"""Role and kinds of parts ("t" text, "i" image) of each turn, as in (("user", "it"), ("assistant", "t"))."""


@dataclass(frozen=True)
class TextSlot:
    """Where a text goes: turn, number of the text in it, and the sides on which the template trims it."""

    turn: int
    text: int
    answer: bool
    trim_left: bool
    trim_right: bool

    def fill(self, texts: tuple[tuple[str, ...], ...]) -> str:
        """The text for this slot, trimmed as the template trims."""
        text = texts[self.turn][self.text]
        text = text.lstrip() if self.trim_left else text
        return text.rstrip() if self.trim_right else text


@dataclass(frozen=True)
class ImageSlot:
    """Where the tokens of the next image go."""


Chunk = str | TextSlot | ImageSlot


def structure_of(sample: Sample, *, open_answer: bool = False) -> Structure:
    """The structure of a sample's turns. With `open_answer` it ends in an assistant turn even if the sample does not.

    Neighbouring texts of a turn count as one, and a turn without a part as one empty text.
    """
    turns = [(turn.role, _kinds(turn)) for turn in sample.turns]
    if open_answer and (not turns or turns[-1][0] != "assistant"):
        turns.append(("assistant", "t"))
    return tuple(turns)


def texts_of(sample: Sample) -> tuple[tuple[str, ...], ...]:
    """The texts of each turn, neighbours joined: what the slots of its structure are filled with."""
    return tuple(_texts(turn) for turn in sample.turns)


def _kinds(turn: Turn) -> str:
    kinds = "".join("t" if isinstance(part, TextPart) else "i" for part in turn.parts)
    return re.sub("t+", "t", kinds) or "t"


def _texts(turn: Turn) -> tuple[str, ...]:
    if len(turn.parts) == 1 and isinstance(turn.parts[0], TextPart):
        return (turn.parts[0].text,)
    texts: list[str] = []
    joined = False
    for part in turn.parts:
        if isinstance(part, TextPart):
            texts[-1:] = [texts[-1] + part.text] if joined else [*texts[-1:], part.text]
        joined = isinstance(part, TextPart)
    return tuple(texts) or (() if turn.parts else ("",))


def render_structure(processor: Any, structure: Structure, image_token: str | None) -> tuple[Chunk, ...]:
    """The chat template's literals, text slots and image slots for a structure, in order.

    Raises DataError that names the template's problem when it drops, repeats, reorders or rewrites texts or images, or
    refuses the turns. Raises CheckpointError when it runs for too long, or asks for too much.
    """
    problems = []
    forms: tuple[Literal["mixed", "parts"], ...] = ("mixed", "parts")
    for form in forms:
        messages = [_message(number, role, kinds, form) for number, (role, kinds) in enumerate(structure)]
        try:
            text = _apply(processor, messages)
        except UnclippedError:  # it runs for too long, or asks for too much
            raise
        except Exception as error:  # a template may raise anything, its own refusals included
            problems.append(f"it fails with {type(error).__name__}: {first_line(error)}")
            continue
        problem = _problem(text, structure, image_token)
        if problem is None:
            return _chunks(text, structure, image_token)
        problems.append(problem)
    turns = ", ".join(f"{role} ({'image and text' if 'i' in kinds else 'text'})" for role, kinds in structure)
    raise DataError(f"the chat template cannot be used for the turns {turns}: {problems[0]}; choose another template")


def _message(turn: int, role: str, kinds: str, form: Literal["mixed", "parts"]) -> dict[str, Any]:
    parts: list[dict[str, str]] = []
    text = 0
    for kind in kinds:
        if kind == "i":
            parts.append({"type": "image"})
        else:
            parts.append({"type": "text", "text": f"{_EDGE}{_OPEN}{turn}.{text}{_CLOSE}{_EDGE}"})
            text += 1
    if form == "mixed" and kinds == "t":  # templates of text-only models know no lists of parts
        return {"role": role, "content": parts[0]["text"]}
    return {"role": role, "content": parts}


def _apply(processor: Any, messages: list[dict[str, Any]]) -> str:
    def render() -> str:
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return text[0] if isinstance(text, list) else text

    tokenizer = getattr(processor, "tokenizer", processor)
    where = f"chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'}"
    try:
        return rendered(where, render, CheckpointError)
    except UsageError as error:  # the template's own refusal, as the processor passes it on
        raise DataError(str(error)) from error


def _problem(rendered: str, structure: Structure, image_token: str | None) -> str | None:
    """What is wrong with a rendering, or None."""
    expected = [(turn, text) for turn, (_, kinds) in enumerate(structure) for text in range(kinds.count("t"))]
    found = [(int(mark.group(2)), int(mark.group(3))) for mark in _MARK.finditer(rendered)]
    if found != expected:
        if sorted(found) == expected:
            return "it changes the order of the texts"
        repeated = [mark for mark in set(found) if found.count(mark) > 1]
        if repeated:
            return f"it repeats the text of turn {min(repeated)[0]}"
        missing = min(set(expected) - set(found))
        return f"it drops or rewrites the text of turn {missing[0]} ({structure[missing[0]][0]})"
    if rendered.count(_OPEN) != len(expected) or "{'type'" in rendered:
        return "it writes the message list out as text"
    images = sum(kinds.count("i") for _, kinds in structure)
    marked = rendered.count(image_token) if image_token else 0
    if marked != images:
        return f"it writes the image token {image_token!r} {marked} times for {images} images"
    return None


def _chunks(rendered: str, structure: Structure, image_token: str | None) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []

    def literal(text: str) -> None:
        pieces = text.split(image_token) if image_token else [text]
        for number, piece in enumerate(pieces):
            if number:
                chunks.append(ImageSlot())
            if piece:
                chunks.append(piece)

    end = 0
    for mark in _MARK.finditer(rendered):
        literal(rendered[end : mark.start()])
        turn = int(mark.group(2))
        answer = structure[turn][0] == "assistant"
        chunks.append(TextSlot(turn, int(mark.group(3)), answer, not mark.group(1), not mark.group(4)))
        end = mark.end()
    literal(rendered[end:])
    return tuple(chunks)
