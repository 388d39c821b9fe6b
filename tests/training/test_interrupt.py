"""Signals that ask training to stop: which are heeded, which stay ignored, and a terminal that is closed."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from unclipped.training.interrupt import StopRequest, stop_this_process


@pytest.fixture
def usual_hangup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_to_stop(usual_hangup: None, number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.is_set
        if number == signal.SIGHUP:
            os.kill(os.getpid(), number)  # a terminal that closes sends several
        else:
            assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_hangup_that_nohup_ignores_stays_ignored(usual_hangup: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set


def test_another_thread_or_process_can_ask() -> None:
    with StopRequest() as outer:
        with StopRequest() as stop:
            stop_this_process()
            assert stop.is_set
        assert not outer.is_set
        stop_this_process()
        assert outer.is_set


def _take_terminal() -> None:
    """Make standard input the terminal that controls a new session."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


PROGRAM = """
import sys, time
from pathlib import Path
from unclipped.training.interrupt import StopRequest
with StopRequest() as stop:
    print("at work", flush=True)
    while not stop.is_set:
        time.sleep(0.02)
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text("saved")
"""


def test_a_closed_terminal_does_not_keep_from_saving(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "state")]
    run = subprocess.Popen(program, stdin=slave, stdout=slave, stderr=slave, preexec_fn=_take_terminal)
    os.close(slave)
    assert b"at work" in os.read(master, 100)
    os.close(master)
    assert run.wait(timeout=30) == 0
    assert (tmp_path / "state").read_text() == "saved"
