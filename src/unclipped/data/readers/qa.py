"""Plain question–answer rows: `id, image, question, answer, choices?, category?, cluster?`.

`image` is a path, a list of paths or absent. `answer` is text, a number, or a list of accepted answers of which the
first is trained on; it may be absent in rows that are only asked. `<image>` in the question says where an image
stands; without one, the images stand before the question.

Options of the source: `prompt`, a pattern in which {question} and {choices} (joined by ", ") are filled in, or a fixed
text in their place, and `answer_case`, "upper" or "lower".
"""

from __future__ import annotations

import json
from typing import Any

from unclipped.core.bounded import check_format
from unclipped.core.errors import UsageError, nearest
from unclipped.data.config import SourceConfig
from unclipped.data.readers.common import PLACEHOLDER, Place, images_of, optional_text, place_images, required, text_of
from unclipped.data.sample import Sample, TextPart, Turn

OPTIONS = ("prompt", "answer_case")
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
    question = text_of(required(row, "question", place), "question", place)
    images = images_of(row.get("image", row.get("images")), "image", place)
    choices = row.get("choices")
    if choices is not None:
        if not isinstance(choices, list):
            raise place.error("choices", f"expected a list of texts, found {type(choices).__name__}")
        choices = [text_of(choice, "choices", place) for choice in choices]
    value = row.get("answer", row.get("answers"))
    given = value if isinstance(value, list) else ([] if value is None else [value])
    answers = [text_of(answer, "answer", place) for answer in given]
    if isinstance(value, list) and not value:
        raise place.error("answer", "the list of accepted answers is empty")
    options = config.options
    if "answer_case" in options:
        answers = [getattr(answer, options["answer_case"])() for answer in answers]
    if "prompt" in options:
        question = options["prompt"].format(question=question, choices=", ".join(choices or ()))
    if PLACEHOLDER in question:
        turns = place_images([("user", question)], images, "question", place)
    else:
        turns = [Turn("user", (*images, TextPart(question)))]
    if answers:
        turns.append(Turn("assistant", (TextPart(answers[0]),)))
    cluster = optional_text(row, "cluster", place)
    known = {"id", "image", "images", "question", "answer", "answers", "choices", "category", "cluster"}
    return Sample(
        id=place.sample,
        turns=tuple(turns),
        category=optional_text(row, "category", place),
        choices=None if choices is None else tuple(choices),
        answers=tuple(answers),
        cluster=cluster,
        metadata={key: item for key, item in row.items() if key not in known and _plain(item)},
    )


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
