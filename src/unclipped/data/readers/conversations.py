"""Conversation rows in three spellings: turns of from/value, of role/content, and of user with assistant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unclipped.data.fields import IMAGE_TYPES, TEXT_TYPES, described, first_held, image_source, is_held
from unclipped.data.readers.common import (
    IMAGE_FIELDS,
    Piece,
    Place,
    images_of,
    optional_text,
    pieces_of,
    place_images,
    text_of,
)
from unclipped.data.sample import Role, Sample

ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
}  # fmt: skip
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation",
              "ipython"}  # fmt: skip
TURN_FIELDS = ("messages", "conversations", "texts")
_TEXT_KEYS = ("value", "content")
_EXCHANGE: dict[str, Role] = {"user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class _Said:
    role: Role
    pieces: list[Piece]

    @property
    def text(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))


def parse_conversation(
    row: Mapping[str, Any],
    place: Place,
    *,
    turn_fields: tuple[str, ...] = TURN_FIELDS,
    image_fields: tuple[str, ...] = IMAGE_FIELDS,
) -> Sample:
    """A sample from the turns and images in the first of these fields that hold something.

    In user turns `<image>`, or an image part that names no image, is the place of the row's next image; an image part
    may also name its own image. Turns of user with assistant need no placeholder: the images are put first. Raises
    DataError for tool turns, unknown roles, empty answers, no turns, or placeholders unlike the images in number.
    """
    field, turns = first_held(row, turn_fields)
    if not isinstance(turns, list):
        raise place.error(field, f"expected a list of turns, found {described(row.get(field))}")
    said = [found for number, turn in enumerate(turns) for found in _turns(turn, f"{field}[{number}]", place)]
    system = optional_text(row, "system", place)
    if system:
        said.insert(0, _Said("system", [system]))
    image_field, value = first_held(row, image_fields)
    images = images_of(value, image_field, place)
    if is_exchange(turns[0]) and not any(None in turn.pieces for turn in said):
        first = next(turn for turn in said if turn.role == "user")
        first.pieces[:0] = images
        images = []
    built = place_images(((turn.role, turn.pieces) for turn in said), images, field, place)
    built = [turn for turn in built if turn.parts or turn.role != "system"]
    return Sample(
        id=place.sample,
        turns=tuple(built),
        category=optional_text(row, "category", place),
        answers=tuple(turn.text for turn in said[-1:] if turn.role == "assistant"),
        cluster=optional_text(row, "cluster", place),
    )


def is_exchange(turn: Any) -> bool:
    """Whether a turn holds a question and its answer, as in {"user": …, "assistant": …}."""
    return (
        isinstance(turn, dict)
        and not is_held(turn.get("from"))
        and not is_held(turn.get("role"))
        and any(key in turn for key in _EXCHANGE)
    )


def _turns(turn: Any, where: str, place: Place) -> Iterator[_Said]:
    """What one entry of the list says: a turn, or a question and its answer."""
    if not isinstance(turn, dict):
        raise place.error(where, f"expected an object, found {type(turn).__name__}")
    if is_exchange(turn):
        for key, role in _EXCHANGE.items():
            yield _said(role, turn, key, where, place)
        return
    _, role = first_held(turn, ("from", "role"))
    if role is None:
        raise place.error(where, f"no role; expected one under from or role, found the keys {_keys(turn)}")
    role = text_of(role, where, place)
    if role in TOOL_ROLES or is_held(turn.get("tool_calls")):
        raise place.error(where, "tool turns are not supported; remove the tool turns or the sample")
    if role not in ROLES:
        raise place.error(where, f"unknown role {role!r}; expected one of {', '.join(sorted(ROLES))}")
    yield _said(ROLES[role], turn, first_held(turn, _TEXT_KEYS)[0], where, place)


def _said(role: Role, turn: dict[str, Any], key: str, where: str, place: Place) -> _Said:
    """The turn of one role. Raises DataError naming the keys found for an answer or question that is not there."""
    found = _Said(role, _pieces(turn.get(key), role, where, place) if _is_given(turn.get(key)) else [])
    if role == "assistant" and not found.text.strip():
        raise place.error(where, f"the answer is empty; {_remedy(turn)}")
    if role == "user" and not _is_given(turn.get(key)):
        raise place.error(where, f"the question is missing; {_remedy(turn)}")
    return found


def _is_given(content: Any) -> bool:
    """Whether a content is there, an empty text included: a user may say nothing and still be answered."""
    return isinstance(content, str) or is_held(content)


def _remedy(turn: dict[str, Any]) -> str:
    expected = "user and assistant" if is_exchange(turn) else " or ".join(_TEXT_KEYS)
    return f"expected text under {expected}, found the keys {_keys(turn)}; add the text or remove the row"


def _keys(turn: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, turn))) or "none"


def _pieces(content: Any, role: Role, where: str, place: Place) -> list[Piece]:
    """A content as pieces. Where a list has image parts, these alone say where images are, and `<image>` is text."""
    if not isinstance(content, list):
        text = text_of(content, where, place)
        return pieces_of(text) if role == "user" else [text]
    pieces: list[Piece] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            pieces.append(part)
        elif kind in TEXT_TYPES:
            pieces.append(text_of(part.get("text"), where, place))
        elif kind in IMAGE_TYPES:
            if role != "user":
                raise place.error(where, f"an image in a turn of the {role}; only user turns may hold images")
            source = image_source(part, lambda message: place.error(where, message))
            pieces += [None] if source is None else images_of(source, where, place)
        else:
            raise place.error(where, f"expected parts of type text or image, found {described(part)}")
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    if all(isinstance(piece, str) for piece in pieces):
        return pieces_of(text) if role == "user" else [text]
    return pieces
