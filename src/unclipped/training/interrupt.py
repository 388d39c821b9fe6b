"""Ctrl-C and termination: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from unclipped.core.errors import UnclippedError


class TrainingInterrupted(UnclippedError):
    """Training was stopped from outside after a checkpoint had been written."""

    exit_code = 130


class StopRequest:
    """While active, the first SIGINT and the first SIGTERM only set `is_set`; a second one acts as it always does."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.is_set = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        # The same signal again acts as always. The other one does not: torchrun answers Ctrl-C with SIGTERM to all.
        signal.signal(number, self._previous.pop(number))

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
