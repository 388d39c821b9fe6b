"""Plain question–answer rows: `id, image, question, answer, choices?, category?, cluster?`.

`image` is a path, a list of paths or absent. `answer` is text, a number, or a list of accepted answers of which the
first is trained on; it may be absent in rows that are only asked. `<image>` in the question says where an image
goes; without one, the images go before the question. `images`, `prompt` and `answers` are read in rows whose `image`,
`question` or `answer` holds nothing.

A whole number next to `choices` is the index of the choice, counted from 0, and the choice's text becomes the answer. A
number that may also be the text of another choice, or is the index of none, is an error. In a list of accepted answers
that holds the text of a choice, all are texts.

Options of the source: `prompt`, a pattern in which {question} and {choices} (joined by ", ") are filled in, or a fixed
text in their place; `answer_case`, "upper" or "lower"; `answer_is`, what numbers next to choices are in every row of
the source: "index_from_0", "index_from_1" (both also for digits written as text) or "text".
"""

from __future__ import annotations

import json
import re
from typing import Any

from unclipped.core.bounded import check_format
from unclipped.core.errors import UsageError, nearest
from unclipped.data.config import SourceConfig
from unclipped.data.fields import first_held, is_held
from unclipped.data.readers.common import (
    IMAGE_FIELDS,
    PLACEHOLDER,
    Place,
    images_of,
    optional_text,
    pieces_of,
    place_images,
    required,
    text_of,
)
from unclipped.data.sample import Sample, TextPart, Turn

OPTIONS = ("prompt", "answer_case", "answer_is")
QUESTION_FIELDS = ("question", "prompt")
ANSWER_FIELDS = ("answer", "answers")
_MEANINGS = ("text", "index_from_0", "index_from_1")
MAX_PROMPT = 10_000
"""Characters of the option `prompt`."""


def check_options(config: SourceConfig, valid: tuple[str, ...] = OPTIONS) -> None:
    """Raises UsageError for an option that the reader does not have or cannot use."""
    for name in config.options:
        if name not in valid:
            raise UsageError(f"source {config.source}: unknown option '{name}'; {nearest(name, valid)}")
    if config.options.get("answer_case", "upper") not in ("upper", "lower"):
        raise UsageError(
            f"source {config.source}: option answer_case: expected upper or lower, "
            f"found {config.options['answer_case']!r}"
        )
    if config.options.get("answer_is", "text") not in _MEANINGS:
        raise UsageError(
            f"source {config.source}: option answer_is: expected text, index_from_0 or index_from_1, "
            f"found {config.options['answer_is']!r}"
        )
    prompt = config.options.get("prompt", "{question}")
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise UsageError(
            f"source {config.source}: option prompt: expected text of at most {MAX_PROMPT:,} characters, with "
            f"{{question}} and {{choices}} where they belong, found {prompt!r:.80}"
        )
    try:
        check_format(prompt, ("question", "choices"))
    except ValueError as error:
        raise UsageError(f"source {config.source}: option prompt: {error}") from None


def parse_qa(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample. Raises DataError naming file, line, sample and field."""
    asked, value = first_held(row, QUESTION_FIELDS)
    if value is None and isinstance(row.get(asked), str):
        value = row[asked]  # an image may be answered without a question
    else:
        asked, value = required(row, QUESTION_FIELDS, place)
    question = text_of(value, asked, place)
    field, value = first_held(row, IMAGE_FIELDS)
    images = images_of(value, field, place)
    choices = _choices(row.get("choices"), place)
    options = config.options
    answers = _answers(row, choices, options.get("answer_is"), place)
    if "answer_case" in options:
        answers = [getattr(answer, options["answer_case"])() for answer in answers]
    if "prompt" in options:
        question = options["prompt"].format(question=question, choices=", ".join(choices or ()))
    if PLACEHOLDER in question:
        turns = place_images([("user", pieces_of(question))], images, asked, place)
    else:
        turns = [Turn("user", (*images, TextPart(question)))]
    if answers:
        turns.append(Turn("assistant", (TextPart(answers[0]),)))
    known = {"id", asked, "question", *IMAGE_FIELDS, *ANSWER_FIELDS, "choices", "category", "cluster"}
    return Sample(
        id=place.sample,
        turns=tuple(turns),
        category=optional_text(row, "category", place),
        choices=None if choices is None else tuple(choices),
        answers=tuple(answers),
        cluster=optional_text(row, "cluster", place),
        metadata={key: item for key, item in row.items() if key not in known and _is_plain(item)},
    )


def _choices(value: Any, place: Place) -> list[str] | None:
    if not is_held(value):
        return None
    if not isinstance(value, list):
        raise place.error("choices", f"expected a list of texts, found {type(value).__name__}")
    return [text_of(choice, f"choices[{number}]", place) for number, choice in enumerate(value)]


def _answers(row: dict[str, Any], choices: list[str] | None, meaning: str | None, place: Place) -> list[str]:
    """The accepted answers, none for a row that is only asked."""
    field, value = first_held(row, ANSWER_FIELDS)
    if value is None:
        if any(isinstance(row.get(name), list) for name in ANSWER_FIELDS):
            raise place.error(field, "the list of accepted answers is empty; add one, or leave the field out")
        return []
    items = value if isinstance(value, list) else [value]
    names = [f"{field}[{number}]" for number in range(len(items))] if isinstance(value, list) else [field]
    if blank := [name for name, item in zip(names, items, strict=True) if isinstance(item, str) and not item.strip()]:
        raise place.error(blank[0], "an accepted answer is empty; remove it or write the text")
    given = [(name, item) for name, item in zip(names, items, strict=True) if is_held(item)]
    known = {_plainly(choice) for choice in choices or ()}
    if choices is None or meaning == "text" or _by_text([item for _, item in given], known, meaning):
        return [text_of(item, name, place) for name, item in given]
    return [_choice(item, choices, meaning, name, place) for name, item in given]


def _by_text(items: list[Any], choices: set[str], meaning: str | None) -> bool:
    """Whether accepted answers name a choice by its text, so that none of them is an index."""
    return meaning is None and any(isinstance(item, str) and _plainly(item) in choices for item in items)


def _choice(value: Any, choices: list[str], meaning: str | None, field: str, place: Place) -> str:
    """The text of an answer next to choices: itself, or that of the choice whose index it is (see the module)."""
    text = text_of(value, field, place)
    if not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text):
        return text
    remedy = f"write the text of the choice, or set options: {{answer_is: {' | '.join(_MEANINGS)}}}"
    if meaning is None and isinstance(value, str):
        raise place.error(field, f"{text!r} is none of the choices and may be the index of one; {remedy}")
    first = 1 if meaning == "index_from_1" else 0
    index = int(text)
    if not first <= index < first + len(choices):
        last = first + len(choices) - 1
        raise place.error(field, f"index {index}, but the choices are numbered {first} to {last}; {remedy}")
    chosen = choices[index - first]
    if meaning is None and _plainly(chosen) != _plainly(text) and _plainly(text) in map(_plainly, choices):
        raise place.error(
            field, f"the number {text} may be the choice {text!r} or the index of the choice {chosen!r}; {remedy}"
        )
    return chosen


def _plainly(text: str) -> str:
    return " ".join(text.split()).casefold()


def _is_plain(value: Any) -> bool:
    """Whether a value can be kept as metadata: it is JSON and not NaN, a missing value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return value == value
