"""Conversations as other programs write them (OpenAI and transformers style), turned into our turns of parts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from unclipped.core.errors import UsageError, nearest
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
    if kind in ("text", "input_text"):
        if not isinstance(part.get("text"), str):
            raise UsageError(f"{where}: a text part needs 'text', found {sorted(part)}")
        return TextPart(part["text"])
    if kind == "image":
        source = next((part[key] for key in ("image", "path", "url", "base64") if part.get(key) is not None), None)
        return ImagePart(_source(source, where, is_base64=part.get("base64") is source))
    if kind == "image_url":
        address = part.get("image_url")
        return ImagePart(_source(address.get("url") if isinstance(address, Mapping) else address, where))
    raise UsageError(f"{where}: type {kind!r}; {nearest(str(kind), ('text', 'image', 'image_url'))}")


def _source(source: Any, where: str, *, is_base64: bool = False) -> Any:
    if source is None:
        raise UsageError(f"{where}: an image part needs 'image', 'path' or 'url'")
    if not isinstance(source, str):
        return source
    if is_base64:
        return _decoded(source, where)
    address = urlparse(source)
    if address.scheme in ("http", "https"):
        raise UsageError(
            f"{where}: images are not fetched from the network ({address.netloc}); give a file or a data: URI"
        )
    if address.scheme == "data":
        header, comma, body = source.partition(",")
        if not comma or not header.endswith(";base64"):
            raise UsageError(f"{where}: expected data:image/…;base64,… as a data: URI")
        return _decoded(body, where)
    return Path(unquote(address.path)) if address.scheme == "file" else source


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{where}: the image is not valid base64") from None
