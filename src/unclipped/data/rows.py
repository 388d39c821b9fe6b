"""Rows of a file by index: JSON lines read lazily by byte offset, and JSON arrays held in memory."""

from __future__ import annotations

import json
import os
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unclipped.core.errors import DataError

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
        try:
            self._starts, self._lines, self._end = _line_starts(Path(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        if not len(self._starts):
            raise DataError(f"{path}: the file is empty; expected one JSON object a line")
        self[0]
        self[len(self) - 1]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._starts):
            raise IndexError(f"{self.file}: row {index} out of {len(self._starts)}")
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._end
        raw = self._read(start, end - start)
        try:
            row = json.loads(raw)
        except UnicodeDecodeError:
            raise DataError(f"{self.file}, {self.place(index)}: not UTF-8 text; save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.file}, {self.place(index)}: not valid JSON ({error.msg} at column {error.colno}); "
                "the file may be cut: remove or repair that line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{self.file}, {self.place(index)}: expected a JSON object, found {type(row).__name__}")
        return row

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
            blank[line] = not stream.read(int(lengths[line])).strip()
    kept = np.flatnonzero(~blank)
    return starts[kept], kept + 1, size


class JsonRows:
    """Rows of a JSON file that holds one array of objects (read whole). Raises DataError as `JsonlRows` does."""

    def __init__(self, path: str | Path) -> None:
        self.file = str(path)
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
                "the file may be cut, or hold one object a line (then name it .jsonl)"
            ) from None
        if not isinstance(value, list):
            raise DataError(f"{path}: expected a JSON array of objects, found {type(value).__name__}")
        if not value:
            raise DataError(f"{path}: the array is empty")
        self._rows = value

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"{self.file}: row {index} out of {len(self._rows)}")
        row = self._rows[index]
        if not isinstance(row, dict):
            raise DataError(f"{self.file}, {self.place(index)}: expected a JSON object, found {type(row).__name__}")
        return row

    def place(self, index: int) -> str:
        return f"item {index}"


def open_rows(path: str | Path) -> Rows:
    """The rows of a .json or .jsonl file; what it is is read from its first character, not from its name."""
    with open(path, "rb") as stream:
        while character := stream.read(1):
            if not character.isspace():
                return JsonRows(path) if character == b"[" else JsonlRows(path)
    raise DataError(f"{path}: the file is empty; expected one JSON object a line, or one JSON array")
