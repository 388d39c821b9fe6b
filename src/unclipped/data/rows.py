"""Rows of a file by index: JSON lines read lazily by byte offset, and JSON arrays held in memory."""

from __future__ import annotations

import codecs
import os
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unclipped.core.documents import (
    MAX_LINE_BYTES,
    check_value,
    kind_of,
    parse_json,
    read_json,
    regular_file,
    shown,
)
from unclipped.core.errors import DataError

WRAPPERS = ("data", "rows", "samples", "examples", "items", "annotations", "questions")
"""Fields that hold the rows of a JSON file whose root is an object."""
_CHUNK_BYTES = 1 << 22


class Rows(Protocol):
    """Rows by index; `place(i)` names row i in error messages."""

    file: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def place(self, index: int) -> str: ...


class JsonlRows:
    """Rows of a JSONL file, found by byte offset: 8 bytes of memory a row, reads safe in threads and forked workers.

    The first and last rows are parsed at once, so that a file cut in the middle of a line is refused when it is opened.
    Raises DataError that names file and line; an empty file is an error.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = str(path)
        regular_file(path)
        try:
            self._starts, self._lines, self._end = _line_starts(Path(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        if not len(self._starts):
            raise DataError(f"{path}: the file is empty; expected one JSON object a line")
        for index in (0, len(self) - 1):
            self._parsed(index, checked=False)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._starts):
            raise IndexError(f"{self.file}: row {index} out of {len(self._starts)}")
        return self._parsed(index)

    def _parsed(self, index: int, *, checked: bool = True) -> dict[str, Any]:
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._end
        where = f"{self.file}, {self.place(index)}"
        if end - start > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes; put one JSON object on each line")
        return parse_json(
            self._read(start, end - start).rstrip(),
            where,
            root=dict,
            remedy="JSON Lines has one object on each line; the file may be cut: remove or repair that line",
            checked=checked,
        )

    def place(self, index: int) -> str:
        return f"line {int(self._lines[index])}"

    def _read(self, start: int, size: int) -> bytes:
        # A positioned read leaves no shared file position behind, so one descriptor serves threads and forks alike.
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.file, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptor)  # unlike __del__, safe when the program ends
        return os.pread(self._descriptor, size, start)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _line_starts(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Byte offsets and numbers (from 1) of the lines that are not blank, and the size of the file in bytes."""
    breaks = []
    size = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        starts = np.concatenate([np.zeros(1, np.int64), *(found + 1 for found in breaks)]).astype(np.int64)
        lengths = np.diff(np.append(starts, size))  # of each line in bytes, its line break included
        blank = lengths <= 1
        for line in np.flatnonzero((lengths > 1) & (lengths <= 64)):  # short lines may be white space alone
            stream.seek(int(starts[line]))
            blank[line] = not stream.read(int(lengths[line])).removeprefix(codecs.BOM_UTF8).strip()
    kept = np.flatnonzero(~blank)
    return starts[kept], kept + 1, size


class JsonRows:
    """Rows of a JSON file that holds one array of objects, or one object with such an array in a field of WRAPPERS.

    The file is read whole. Raises DataError as `JsonlRows` does.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = str(path)
        value = read_json(
            path,
            root=None,
            remedy="the file may be cut; expected one array, or one object on each line (`jq -c . FILE` writes that)",
            checked=False,  # each row is checked when it is read, so that a bad one can be named and skipped
        )
        if isinstance(value, dict):
            value = _unwrapped(value, self.file)
        if not isinstance(value, list):
            raise DataError(f"{path}: expected a JSON array of objects, found {kind_of(value)}")
        if not value:
            raise DataError(f"{path}: the array is empty")
        self._rows = value

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"{self.file}: row {index} out of {len(self._rows)}")
        row, where = self._rows[index], f"{self.file}, {self.place(index)}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {kind_of(row)}")
        check_value(row, where)
        return row

    def place(self, index: int) -> str:
        return f"item {index}"


def _unwrapped(value: dict[str, Any], file: str) -> list[Any]:
    """The rows inside the one object of a file. Raises DataError that lists its fields when it holds none."""
    for name in WRAPPERS:
        rows = value.get(name)
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            return rows
    found = ", ".join(sorted(map(shown, value))) or "none"
    raise DataError(
        f"{file}: one JSON object over several lines, with the fields {found}; expected an array of objects, one "
        f"object on each line (`jq -c . FILE` writes that), or an array in a field {', '.join(WRAPPERS)}"
    )


def open_rows(path: str | Path) -> Rows:
    """The rows of a .json or .jsonl file; which of the two it is shows in its content, not in its name.

    Raises DataError for an empty file, and names what was found where it is neither.
    """
    regular_file(path)
    with open(path, "rb") as stream:
        first = b""
        while not first.strip():
            first = stream.readline(MAX_LINE_BYTES + 1)
            if not first:
                raise DataError(f"{path}: the file is empty; expected one JSON object a line, or one JSON array")
            first = first.removeprefix(codecs.BOM_UTF8)
        only = not stream.read(1 << 16).strip()
    start = first.lstrip()[:1]
    if start == b"[" or (start == b"{" and _is_one_document(first, only)):
        return JsonRows(path)
    return JsonlRows(path)


def _is_one_document(first: bytes, only: bool) -> bool:
    """Whether a file that begins with an object is one document: it goes beyond the first line, or wraps its rows.

    first: the first line that is not blank. only: whether nothing follows it.
    """
    text = first.strip()
    if only:
        return any(f'"{name}"'.encode() in text[:4096] for name in WRAPPERS) and _wraps(first)
    return not text.endswith(b"}") and text[-1:] in b"{[,:"  # a line that cannot end a row: an object printed in lines


def _wraps(line: bytes) -> bool:
    value = parse_json(line, "the first line", checked=False)
    return isinstance(value, dict) and any(
        isinstance(value.get(name), list) and value[name] and isinstance(value[name][0], dict) for name in WRAPPERS
    )
