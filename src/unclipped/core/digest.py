"""Digests of files: sizes and contents written down, and compared later to say which file changed and how.

A group of files (a data file, a folder of images, a model folder) of at most 256 MB is read whole. Of a larger one all
names and sizes count, and of the contents blocks that are spread evenly over every file; of more than 10,000 files,
over that many. So a change of size is always found; one that keeps every size is found where a block meets it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unclipped.core.errors import DataError

READ_WHOLE = 256 << 20
"""Bytes of a group that are all read."""
_BLOCK = 64 << 10
_CONTENTS = 10_000
"""Files of a larger group of which blocks are read."""
_NAMED = 2_000
"""Files of a group that are kept one by one, so that a change can name them."""
_THREADS = 8

_known: dict[tuple[Any, ...], tuple[str, int]] = {}
"""What this process has read of a file already, by its state on disk and the number of blocks."""


def file_digest(path: str | Path, blocks: int | None = None) -> tuple[str, int]:
    """(digest, line ends) of a file; of so many blocks of it when `blocks` is given. Raises OSError."""
    status = os.stat(path)
    key = (os.fspath(path), status.st_size, status.st_mtime_ns, status.st_ino, blocks)
    if key not in _known:
        total, lines = hashlib.blake2b(digest_size=16), 0
        with open(path, "rb") as stream:
            if blocks is None or blocks * _BLOCK >= status.st_size:
                while block := stream.read(_BLOCK << 4):
                    total.update(block)
                    lines += block.count(b"\n")
            else:
                last = status.st_size - _BLOCK
                for number in range(blocks):
                    stream.seek(last * number // max(1, blocks - 1))
                    total.update(stream.read(_BLOCK))
        _known[key] = total.hexdigest(), lines
    return _known[key]


def describe_files(files: Mapping[str, Path]) -> dict[str, Any]:
    """JSON form of a group of files {name: path}: number, bytes, digest, and up to 2,000 files one by one.

    A file that is not there counts as one of -1 bytes. Raises DataError when one cannot be read.
    """
    sizes = {name: _size(path) for name, path in sorted(files.items())}
    total = sum(max(0, size) for size in sizes.values())
    is_whole = total <= READ_WHOLE
    stride = 1 if is_whole else -(-len(sizes) // _CONTENTS)
    read = [name for number, name in enumerate(sizes) if number % stride == 0 and sizes[name] >= 0]

    def content(name: str) -> tuple[str, int]:
        blocks = None if is_whole else max(2, READ_WHOLE // _BLOCK * sizes[name] // total)
        try:
            return file_digest(files[name], blocks)
        except OSError as error:
            raise DataError(
                f"{files[name]}: cannot be read ({error.strerror or error}); check its permissions"
            ) from None

    with ThreadPoolExecutor(_THREADS) as pool:
        contents = dict(zip(read, pool.map(content, read), strict=True))
    group = hashlib.blake2b(digest_size=16)
    for name, size in sizes.items():
        group.update(f"{name}\0{size}\0{contents.get(name, ('', 0))[0]}\n".encode("utf-8", "surrogateescape"))
    found: dict[str, Any] = {
        "files": len(sizes), "bytes": total, "read": "whole" if is_whole else "blocks", "digest": group.hexdigest()
    }  # fmt: skip
    if len(sizes) <= _NAMED:
        found["each"] = {
            name.encode("utf-8", "backslashreplace").decode(): [size, *contents.get(name, ("", 0))]
            for name, size in sizes.items()
        }
    return found


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def changes_between(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of a group, each in a few words; empty when nothing does."""
    if was.get("digest") == now.get("digest"):
        return []
    before, after = was.get("each"), now.get("each")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return [
            f"{was.get('files')} files of {was.get('bytes')} bytes then, {now['files']} of {now['bytes']} bytes now"
        ]
    found = [f"{name} is new" for name in after if name not in before]
    found += [f"{name} is gone" for name in before if name not in after]
    found += [
        f"{name} {_difference(before[name], after[name], _UNITS.get(Path(name).suffix))}"
        for name in after
        if name in before and before[name] != after[name]
    ]
    return found or ["its files differ"]


_UNITS = {".jsonl": "rows", ".txt": "lines", ".md": "lines"}


def _difference(was: Any, now: Any, unit: str | None) -> str:
    if now[0] < 0:
        return "is gone"
    is_counted = unit is not None and isinstance(was, list) and len(was) == 3 and isinstance(was[2], int)
    if is_counted and now[2] != was[2] and now[2] and was[2]:  # of a file read by blocks no lines are known
        return f"has {abs(now[2] - was[2]):,} {unit} {'fewer' if now[2] < was[2] else 'more'}"
    return "has another content"


def listed_changes(changes: Iterable[str], most: int = 4) -> str:
    """The first few changes in one line, and how many more there are."""
    found = list(changes)
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")
