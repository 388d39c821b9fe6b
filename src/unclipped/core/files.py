"""Files written whole or not at all, and run folders that are never overwritten by accident."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclipped.core.documents import regular_file
from unclipped.core.errors import DataError, UnclippedError, UsageError, guarded
from unclipped.core.lock import LOCK_FILE

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    It gets the mode that the umask gives, whatever the writer sets (safetensors: 0600). Raises OSError when it cannot
    be written; what was there before is then kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        mode = _touched(temporary)
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A hidden name beside `path` that no other process takes."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}"


def _touched(new: Path) -> int:
    """Make an empty file and return its mode: the umask can only be asked for by setting it, for all threads."""
    new.touch(exist_ok=False)
    return stat.S_IMODE(new.stat().st_mode)


def _set_modes(folder: Path) -> None:
    """Give all files below `folder` the mode that a new one gets."""
    probe = _beside(folder / "mode")
    mode = _touched(probe)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to a temporary name beside `path`, then rename: readers never see half a file.

    Raises UnclippedError that names the file when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnclippedError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically (see `write_text`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: `unclipped/NAME` in $XDG_CACHE_HOME, or in ~/.cache. It may be deleted."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "unclipped" / name


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an .npy file under a temporary name, then rename: processes that make the same do not disturb each other.

    Raises OSError when it cannot be written.
    """
    import numpy

    with whole_file(path) as temporary, open(temporary, "wb") as stream:
        numpy.save(stream, values)


def read_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """An .npy file, `mapped` read-only rather than read. Raises FileNotFoundError, DataError for anything else."""
    import numpy

    if not path.exists():
        raise FileNotFoundError(path)
    regular_file(path)
    with guarded(lambda reason: DataError(f"{path}: no array can be read from it ({reason}); remove it")):
        found = numpy.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    if not isinstance(found, numpy.ndarray):
        raise DataError(f"{path}: an archive of arrays, expected one array; remove it")
    return found


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file, one line a row, flushed once. Raises UnclippedError when it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UnclippedError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from None


def cut_unfinished_line(path: str | Path) -> int:
    """Remove what stands behind the last line end of a JSONL file: a write that was cut short; -> bytes removed.

    A last line that is a whole JSON object and lacks its line end only is given one. Raises UnclippedError when the
    file cannot be changed.
    """
    path = Path(path)
    try:
        with open(path, "rb+") as stream:
            end = start = stream.seek(0, os.SEEK_END)
            tail = b""
            while start > 0 and b"\n" not in tail:
                step = min(start, 1 << 16)
                start -= step
                stream.seek(start)
                tail = stream.read(step) + tail
            line = tail[tail.rfind(b"\n") + 1 :]
            if not line:
                return 0
            if _is_object(line):
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
                return 0
            stream.truncate(end - len(line))
            os.fsync(stream.fileno())
            return len(line)
    except OSError as error:
        raise UnclippedError(f"cannot repair {path}: {error.strerror or error}; check its permissions") from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def is_empty_folder(path: Path) -> bool:
    """Whether a folder is not there or holds nothing but the lock of a run."""
    return not path.exists() or (path.is_dir() and all(item.name == LOCK_FILE for item in path.iterdir()))


def new_run_folder(path: str | Path, *, resume: bool = False, can_resume: bool = True) -> Path:
    """Make the folder of a run. Raises UsageError when it holds something already and `resume` is false.

    `can_resume`: whether the command has --resume, for the remedy.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output {path}: is a file, not a folder")
    if not resume and not is_empty_folder(path) and path.is_dir():
        remedy = "choose another, remove it, or add --resume to go on" if can_resume else "choose another or remove it"
        raise UsageError(f"--output {path}: the folder is not empty; {remedy}")
    try:
        through_links(path).mkdir(parents=True, exist_ok=True)
        handle, probe = tempfile.mkstemp(dir=path, prefix=".write-test.")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise UnclippedError(
            f"--output {path}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from None
    return path


def through_links(path: Path) -> Path:
    """Where a path that is a symbolic link leads to, be it there or not; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends without an error.

    A symbolic link stays one: what it leads to is written.
    It and its files get the modes that the umask gives, whatever their writers set (safetensors: 0600). Raises
    UnclippedError when the disk is full or cannot be written; what was there before is then kept.
    """
    from safetensors import SafetensorError

    temporary: Path | None = None
    folder = through_links(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(folder)
        temporary.mkdir()
        yield temporary
        _set_modes(temporary)
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
            os.replace(folder, old)  # an empty folder may be replaced
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UnclippedError(f"cannot write {folder}: {reason}; free space or choose another folder") from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)
