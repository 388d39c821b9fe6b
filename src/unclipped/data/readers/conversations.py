"""Conversation rows in both spellings: `conversations` of from/value and `messages` of role/content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unclipped.data.readers.common import PLACEHOLDER, Place, described, images_of, optional_text, place_images, text_of
from unclipped.data.sample import Sample

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
}  # fmt: skip
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation",
              "ipython"}  # fmt: skip


def parse_conversation(row: dict[str, Any], place: Place, *, turns_field: str, image_field: str) -> Sample:
    """A sample from the turns in `turns_field` and the images in `image_field`.

    Raises DataError for tool turns, unknown roles, no turns, or a number of placeholders unlike that of the images.
    """
    turns = row.get(turns_field)
    if not isinstance(turns, list) or not turns:
        raise place.error(turns_field, f"expected a list of turns, found {described(turns)}")
    pairs = list(_pairs(turns, turns_field, place))
    system = optional_text(row, "system", place)
    if system:
        pairs.insert(0, ("system", system))
    images = images_of(row.get(image_field), image_field, place)
    built = place_images(pairs, images, turns_field, place)
    built = [turn for turn in built if turn.parts or turn.role != "system"]
    answers = tuple(text for role, text in pairs[-1:] if role == "assistant")
    return Sample(
        id=place.sample,
        turns=tuple(built),
        category=optional_text(row, "category", place),
        answers=answers,
        cluster=optional_text(row, "cluster", place),
    )


def _pairs(turns: list[Any], field: str, place: Place) -> Iterator[tuple[str, str]]:
    for number, turn in enumerate(turns):
        where = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise place.error(where, f"expected an object, found {type(turn).__name__}")
        role = turn.get("from", turn.get("role"))
        if role in TOOL_ROLES or turn.get("tool_calls"):
            raise place.error(where, "tool turns are not supported; remove the tool turns or the sample")
        if role not in ROLES:
            raise place.error(where, f"unknown role {role!r}; expected one of {', '.join(sorted(ROLES))}")
        content = turn.get("value", turn.get("content"))
        yield ROLES[role], _content(content, where, place)


def _content(content: Any, where: str, place: Place) -> str:
    """Text with placeholders; a list of parts (type text or image) is written out as such."""
    if not isinstance(content, list):
        return text_of("" if content is None else content, where, place)
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            pieces.append(text_of(part.get("text"), where, place))
        elif kind in ("image", "image_url"):
            pieces.append(PLACEHOLDER)
        else:
            raise place.error(where, f"expected parts of type text or image, found {described(part)}")
    return "".join(pieces)
