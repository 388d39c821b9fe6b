"""Arms side by side under signals: they end with the process that started them, and save first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("arms_worker.py")


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Started:
    """The worker in a session of its own, with all its arms at work."""

    def __init__(self, folder: Path, *arms: str) -> None:
        self.folder, self.arms = folder, arms
        command = [sys.executable, str(WORKER), str(folder), *arms]
        self.parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        until(lambda: all((folder / arm / "started").exists() for arm in arms[:2]))
        self.children = [int((folder / arm / "started").read_text()) for arm in arms[:2]]

    def has_saved(self, arm: str) -> bool:
        return (self.folder / arm / "saved").exists()

    def end(self) -> tuple[int, str]:
        _, said = self.parent.communicate(timeout=60)
        return self.parent.returncode, said

    def clean(self) -> None:
        for pid in (self.parent.pid, *self.children):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.parent.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Started]:
    started: list[Started] = []

    def begin(*arms: str) -> Started:
        started.append(Started(tmp_path, *arms))
        return started[-1]

    yield begin  # type: ignore[misc]
    for one in started:
        one.clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("whole_group", [False, True], ids=["parent", "group"])
def test_arms_save_and_end_with_the_process_that_is_told_to_end(
    start: Callable[..., Started], number: int, whole_group: bool
) -> None:
    run = start("a", "measures", "later")
    (os.killpg if whole_group else os.kill)(run.parent.pid, number)
    status, said = run.end()
    assert status == 130, said
    assert [line for line in said.splitlines() if line] == [
        "error: arm a: interrupted after step 7; saved. Go on with the same command and --resume"
    ]
    assert run.has_saved("a")
    assert not any(map(is_alive, run.children))
    assert not (run.folder / "later").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_all_arms_at_once(start: Callable[..., Started], number: int) -> None:
    run = start("slow 1", "slow 2")
    os.kill(run.parent.pid, number)
    time.sleep(0.5)
    assert all(map(is_alive, run.children))
    os.kill(run.parent.pid, number)
    assert run.end()[0] == -number
    until(lambda: not any(map(is_alive, run.children)), 5)
    assert not run.has_saved("slow 1")


def test_arms_save_and_end_when_the_process_that_started_them_is_killed(start: Callable[..., Started]) -> None:
    run = start("a", "measures")
    os.kill(run.parent.pid, signal.SIGKILL)
    until(lambda: not any(map(is_alive, run.children)), 20)
    assert run.has_saved("a")
