"""Conversations as other programs write them (OpenAI and transformers style), turned into our turns of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unclipped.core.errors import UsageError, nearest
from unclipped.data.fields import IMAGE_TYPES, TEXT_TYPES, image_source
from unclipped.data.sample import ImagePart, Part, Sample, TextPart, Turn

Messages = Sequence[Mapping[str, Any]]
"""[{"role": "user", "content": text or [{"type": "text", "text": …}, {"type": "image", "image": …}]}, …]"""

_ROLES = ("system", "user", "assistant")


def sample_from_messages(messages: Messages, name: str = "conversation") -> Sample:
    """A sample from messages whose last one is the user's. `name` stands for the conversation in errors.

    Images: {"type": "image", "image" | "path" | "url": …} or {"type": "image_url", "image_url": {"url": …}}, each a
    Pillow object, bytes, file path, file:// address or data: URI. Raises UsageError naming message and part.
    """
    if not messages:
        raise UsageError(f"{name}: no messages; give at least one of role 'user'")
    turns = tuple(_turn(message, f"{name}, message {index}") for index, message in enumerate(messages))
    if turns[-1].role != "user":
        raise UsageError(
            f"{name}: the last message has role '{turns[-1].role}'; expected 'user', whose turn is answered"
        )
    return Sample(id=name, turns=turns)


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise UsageError(f"{where}: role {role!r}; {nearest(str(role), _ROLES)}")
    for name in ("tool_calls", "tool_call_id", "documents", "reasoning_content", "reasoning"):
        if message.get(name):
            raise UsageError(f"{where}: '{name}' is not read here; leave it out, or write it as text")
    if isinstance(content, str):
        return Turn(role, (TextPart(content),))
    if not isinstance(content, Sequence) or not content:
        raise UsageError(f"{where}: content must be a text or a list of parts, found {type(content).__name__}")
    return Turn(role, tuple(_part(part, f"{where}, part {index}") for index, part in enumerate(content)))


def _part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXT_TYPES:
        if not isinstance(part.get("text"), str):
            raise UsageError(f"{where}: a text part needs 'text', found {sorted(part)}")
        return TextPart(part["text"])
    if kind in IMAGE_TYPES:
        source = image_source(part, lambda message: UsageError(f"{where}: {message}"))
        if source is None:
            raise UsageError(f"{where}: an image part needs 'image', 'path' or 'url', found {sorted(map(str, part))}")
        return ImagePart(source)
    raise UsageError(f"{where}: type {kind!r}; {nearest(str(kind), ('text', 'image', 'image_url'))}")
