"""Limits on programs that users bring: time and memory of chat templates and regular expressions, fields of formats.

A chat template is a program that comes with a model, and a regular expression may take longer than the universe is
old. Both run inside `bounded`. Format strings have a grammar that can be checked, so `check_format` refuses them before
they run.
"""

from __future__ import annotations

import ctypes
import signal
import string
import sys
import threading
import time
from collections.abc import Callable, Collection
from types import FrameType, TracebackType
from typing import Any

from unclipped.core.errors import DataError, UnclippedError

SECONDS = 5.0
"""Time that a user's program may take."""
MEMORY = 1 << 30
"""Bytes by which a user's program may enlarge the process."""
MAX_CHARACTERS = 1_000_000
"""Length of what a chat template renders around the texts of a conversation."""
_RING_AGAIN = 0.5  # seconds; for code that swallows the first interruption


class _Overdue(BaseException):
    """The time is up. No Exception, so that no handler between the program and its limit swallows it."""


class bounded:
    """Limit the time and the memory of what runs inside. Raises `error` with one line that names `what` and the limit.

    Time: in the main thread by a timer signal, which Python checks between operations and inside regular expressions;
    an earlier timer keeps its own deadline. In other threads by an exception from a watchdog, which waits for the end
    of a single long operation. Memory: on Linux, by the process's limit on address space, which is lowered meanwhile.
    `memory=None` leaves memory alone, which is cheaper. Limits may be nested.

    >>> with bounded("chat template of x", seconds=0.01):
    ...     while True:
    ...         pass
    Traceback (most recent call last):
    unclipped.core.errors.DataError: chat template of x: runs longer than 0.01 s, which is the limit; simplify it
    """

    def __init__(
        self,
        what: str,
        *,
        seconds: float = SECONDS,
        memory: int | None = MEMORY,
        error: type[UnclippedError] = DataError,
    ) -> None:
        self.what, self.seconds, self.memory, self.error = what, seconds, memory, error
        self._is_overdue = self._is_closed = False
        self._watchdog: threading.Timer | None = None

    def __enter__(self) -> bounded:
        self._start = time.monotonic()
        if self.memory is not None:
            _lower_memory(self.memory)
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            self._handler = signal.signal(signal.SIGALRM, self._ring)
            self._left, self._interval = signal.setitimer(signal.ITIMER_REAL, self.seconds, _RING_AGAIN)
            if 0 < self._left < self.seconds:  # the timer around this one is due first
                signal.setitimer(signal.ITIMER_REAL, self._left, _RING_AGAIN)
        else:
            self._lock, self._thread = threading.Lock(), threading.get_ident()
            self._watchdog = threading.Timer(self.seconds, self._interrupt)
            self._watchdog.daemon = True
            self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watchdog is None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler)
            if self._left:
                rest = self._left - (time.monotonic() - self._start)
                signal.setitimer(signal.ITIMER_REAL, max(rest, 1e-3), self._interval)
        else:
            with self._lock:
                self._is_closed = True
            self._watchdog.cancel()
            if self._is_overdue and kind is not _Overdue:  # sent, and not yet received
                _send(self._thread, None)
        if self.memory is not None:
            _restore_memory()
        if kind is _Overdue and self._is_overdue:
            raise self.error(
                f"{self.what}: runs longer than {self.seconds:g} s, which is the limit; simplify it"
            ) from None
        if kind is not None and issubclass(kind, MemoryError) and self.memory is not None:
            size = f"{self.memory / (1 << 30):g} GB"
            raise self.error(
                f"{self.what}: needs more than {size} of memory, which is the limit; simplify it"
            ) from None

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._left and time.monotonic() - self._start >= self._left and callable(self._handler):
            self._handler(number, frame)  # the timer around this one
        if time.monotonic() - self._start < self.seconds:
            return
        if frame is not None and frame.f_code is bounded.__exit__.__code__:
            return  # done in time, as good as
        self._is_overdue = True
        raise _Overdue

    def _interrupt(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_overdue = True
                _send(self._thread, _Overdue)


def _send(thread: int, kind: type[BaseException] | None) -> None:
    """Raise `kind` in another thread at its next operation; None takes back what was sent."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind))


_memory_lock = threading.Lock()
_memory_depth = 0
_memory_before: tuple[int, int] | None = None


def _lower_memory(more: int) -> None:
    """Limit the address space to its present size and `more` bytes. The outermost limit holds for those inside it."""
    global _memory_depth, _memory_before
    if sys.platform != "linux":
        return
    import resource

    with _memory_lock:
        _memory_depth += 1
        if _memory_depth > 1:
            return
        try:
            with open("/proc/self/statm", "rb") as stream:
                present = int(stream.read().split()[0]) * resource.getpagesize()
        except OSError:  # a system without /proc: time alone is limited
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = present + more
        if any(limit != resource.RLIM_INFINITY and limit <= wanted for limit in (soft, hard)):
            return  # a tighter limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        _memory_before = (soft, hard)


def _restore_memory() -> None:
    global _memory_depth, _memory_before
    if sys.platform != "linux":
        return
    import resource

    with _memory_lock:
        _memory_depth -= 1
        if _memory_depth == 0 and _memory_before is not None:
            resource.setrlimit(resource.RLIMIT_AS, _memory_before)
            _memory_before = None


def rendered(what: str, render: Callable[[], str], error: type[UnclippedError] = DataError) -> str:
    """The text that `render` makes by a chat template, which `what` names, within the limits of this module."""
    with bounded(what, error=error):
        text = render()
    if len(text) > MAX_CHARACTERS:
        raise error(
            f"{what}: writes {len(text):,} characters around the texts; the limit is {MAX_CHARACTERS:,}; simplify it"
        )
    return text


def check_format(text: str, fields: Collection[str]) -> None:
    """Raise ValueError for a format string that holds more than plain `fields`; `""` stands for `{}`.

    Widths, precisions and conversions are refused, because they can ask for gigabytes; attributes and indices, because
    they reach into the program.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{_shortened(text)}: {error}; write {{{{ and }}}} for braces that stay") from None
    allowed = ", ".join(f"{{{name}}}" for name in fields) or "none"
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if name not in fields:
            raise ValueError(f"{_shortened(text)}: unknown field {{{_shortened(name)}}}; expected {allowed}")
        if form or conversion:
            raise ValueError(
                f"{_shortened(text)}: field {{{name}}} has a width, a form or a conversion, which is not taken; "
                f"write {{{name}}}"
            )


def _shortened(value: Any, most: int = 60) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= most else text[: most - 1] + "…"
