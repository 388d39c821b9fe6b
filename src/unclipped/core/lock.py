"""Locks of run folders: one process writes a run at a time, and a second one is refused by name of the first.

The lock is the file `run.lock` with process and host, held by the operating system (flock) for as long as the process
lives, so that a crash frees it. Where a file system has no such locks, the process named in the file decides.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unclipped.core.errors import UnclippedError, UsageError

LOCK_FILE = "run.lock"
_PATIENCE = 6.0
"""Seconds for which data workers of a process that was killed may hold its lock."""


@contextmanager
def folder_lock(folder: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold the lock of `folder`, which exists, while the block runs.

    Raises UsageError that names process and host when another one holds it, UnclippedError when the file cannot be
    written.
    """
    path = folder / name
    deadline = time.monotonic() + _PATIENCE
    while (stream := _taken(path)) is None:
        pid, host = _holder(path)
        if host != socket.gethostname() or pid is None or _lives(pid) or time.monotonic() > deadline:
            raise refusal(path)
        time.sleep(0.2)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is given back: the file of the next holder must stay
        os.close(stream)


def refusal(path: Path) -> UsageError:
    """The error that names the holder of a lock."""
    pid, host = _holder(path)
    holder = f"process {pid} on {host}" if pid is not None else "another process"
    return UsageError(
        f"{path.parent}: {holder} is writing this run; wait for it or stop it, or take another --output. "
        f"If it has ended already, remove {path}"
    )


def _taken(path: Path) -> int | None:
    """A descriptor of the lock file, locked and filled in by this process; None when another one holds it."""
    while True:
        pid, host = _holder(path)
        if pid is not None and host != socket.gethostname():
            return None  # locks of other machines do not reach every file system
        try:
            stream = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(path, error) from None
        if not _locked(stream, path):
            os.close(stream)
            return None
        try:
            is_same = os.fstat(stream).st_ino == os.stat(path).st_ino
        except FileNotFoundError:
            is_same = False
        if is_same:
            break
        os.close(stream)  # its holder removed it in the meantime
    content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    try:
        os.ftruncate(stream, 0)
        os.pwrite(stream, content, 0)
    except OSError as error:
        os.close(stream)
        raise _unwritable(path, error) from None
    return stream


def _unwritable(path: Path, error: OSError) -> UnclippedError:
    return UnclippedError(
        f"--output {path.parent}: cannot be written ({error.strerror or error}); free space or choose another folder"
    )


def _locked(stream: int, path: Path) -> bool:
    """Whether the operating system gave the lock; without such locks, whether the process in the file is gone."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no locks on this system or file system
        pid, _ = _holder(path)
        return pid is None or pid == os.getpid() or not _lives(pid)
    return True


def _holder(path: Path) -> tuple[int | None, str]:
    """Process and host in a lock file; None when it is not there or was never filled in."""
    try:
        found = json.loads(path.read_bytes()[:1000])
        return max(1, int(found["pid"])), str(found["host"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None, "an unknown host"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
