"""Fields of rows and messages of unknown origin: the first name that holds something, values as text, image addresses.

Readers and chat share these rules, so a row of a file and a message of a conversation mean the same. `refuse` makes the
error of the caller from what is wrong and what to do.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from unclipped.core.errors import UnclippedError

Refuse = Callable[[str], UnclippedError]

TEXT_TYPES = ("text", "input_text")
"""Types of a content part that is text, under the key `text`."""
IMAGE_TYPES = ("image", "image_url")
"""Types of a content part that is an image; see `image_source`."""

_EXACT = 2**53  # whole floats from here on may have lost digits, so they keep their own form
_IMAGE_KEYS = ("bytes", "image", "path", "url", "base64", "image_url")


def is_held(value: Any) -> bool:
    """Whether a field holds something: not null, not NaN, no blank text, no list or mapping without such a value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(is_held(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(is_held(item) for item in value)
    return True


def first_held(row: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Any]:
    """(name, value) of the first of `names` under which `row` holds something.

    When none does: the first name that the row has at all, else the first name, and None.

    >>> first_held({"image": None, "images": ["a.png"]}, ("image", "images"))
    ('images', ['a.png'])
    """
    names = tuple(names)
    for name in names:
        if is_held(value := row.get(name)):
            return name, value
    return next((name for name in names if name in row), names[0]), None


def as_text(value: Any, refuse: Refuse) -> str:
    """`value` as text; a number is written as JSON writes it, a whole float as an integer.

    Raises what `refuse` makes for null and NaN, booleans, infinities and everything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(float(value))
    raise refuse(f"expected text, found {described(value)}")


def image_source(part: Mapping[str, Any], refuse: Refuse) -> Any:
    """What an image part or record names under `image`, `path`, `url`, `base64`, `bytes` or `image_url`, else None.

    Text comes back as a path or as decoded bytes (see `located`), anything else as it is.
    """
    key, source = first_held(part, _IMAGE_KEYS)
    if key == "image_url" and isinstance(source, Mapping):
        source = source.get("url")
    if not isinstance(source, str):
        return source
    return _decoded(source, refuse) if key == "base64" else located(source, refuse)


def located(address: str, refuse: Refuse) -> str | Path | bytes:
    """A file path, the path of a file:// address, or the bytes of a data: URI.

    Raises what `refuse` makes for network addresses, which are not fetched, and for damaged data: URIs.
    """
    scheme = address.partition(":")[0].lower()
    if scheme in ("http", "https") and "://" in address:
        host = address.partition("://")[2].partition("/")[0]
        raise refuse(f"images are not fetched from the network ({host}); give a file or a data: URI")
    if scheme == "data" and ":" in address:
        header, comma, body = address.partition(",")
        if not comma or not header.endswith(";base64"):
            raise refuse("expected data:image/…;base64,… as a data: URI")
        return _decoded(body, refuse)
    return Path(unquote(urlparse(address).path)) if address.lower().startswith("file://") else address


def described(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN (a missing value)" if math.isnan(value) else "infinity"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _decoded(text: str, refuse: Refuse) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise refuse("the image is not valid base64; encode the bytes of its file") from None
