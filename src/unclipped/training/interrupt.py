"""Signals that ask to stop (Ctrl-C, termination, a closed terminal): finish the step, save, say how to go on."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

from unclipped.core.errors import UnclippedError


class TrainingInterrupted(UnclippedError):
    """Training was stopped from outside after a checkpoint had been written."""

    exit_code = 130


class StopRequest:
    """While active, a first SIGINT, SIGTERM or SIGHUP only sets `is_set`; a second SIGINT or SIGTERM acts as always.

    A second SIGHUP changes nothing, because a terminal that closes sends several. Where SIGHUP is ignored (nohup), it
    stays ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    active: ClassVar[StopRequest | None] = None
    """The innermost one of this process."""

    def __init__(self, again: Callable[[], None] | None = None) -> None:
        """`again`: called at the second SIGINT or SIGTERM, before it acts."""
        self.is_set = False
        self._again = again
        self._previous: dict[int, Any] = {}
        self._outer: StopRequest | None = None

    def __enter__(self) -> StopRequest:
        self._outer, StopRequest.active = StopRequest.active, self
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread
            for number in self.SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        if number == signal.SIGHUP:
            leave_closed_terminal()
        # The same signal again acts as always. The other one does not: torchrun answers Ctrl-C with SIGTERM to all.
        elif self._again is None:
            signal.signal(number, self._previous.pop(number))
        else:
            signal.signal(number, self._handle_second)

    def _handle_second(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._previous.pop(number))
        if self._again is not None:
            self._again()
        signal.raise_signal(number)

    def __exit__(self, *error: object) -> None:
        StopRequest.active = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def stop_this_process() -> None:
    """Ask the active `StopRequest` to stop; without one there is nothing to save, and SIGTERM ends the process."""
    if StopRequest.active is not None:
        StopRequest.active.is_set = True
    else:
        os.kill(os.getpid(), signal.SIGTERM)


def leave_closed_terminal() -> None:
    """Send output that goes to a terminal which is gone to nowhere: writing there would fail before all is saved."""
    for descriptor in (1, 2):
        try:
            is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
        except OSError:  # closed
            continue
        if is_device and not os.isatty(descriptor):  # the kernel no longer calls it a terminal
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
