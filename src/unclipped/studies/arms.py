"""Several arms of an experiment at the same time, each in its own process with its share of the cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from unclipped.core.documents import read_json
from unclipped.core.errors import UnclippedError
from unclipped.core.files import write_json
from unclipped.core.lock import folder_lock
from unclipped.training.interrupt import StopRequest, TrainingInterrupted, stop_this_process
from unclipped.training.progress import newest_metrics

LOG, ERROR, ARM_LOCK = "log.txt", "error.json", "arm.lock"
_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_TO_SAVE = 20.0
_OF_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Signals that a terminal sends to all its processes."""


class ArmFailed(UnclippedError):
    """An arm ended with an error; the message is its own, the exit status too."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def threads_each(at_once: int) -> int:
    """CPU threads of each of `at_once` processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // at_once)


@dataclass(frozen=True)
class _Running:
    """An arm at work. It is asked to stop when `hold` is closed, which the end of this process does in any case."""

    process: Any
    hold: Any


def run_side_by_side(
    folders: dict[str, Path],
    run: Callable[[str], Any],
    *,
    at_once: int,
    say: Callable[[str], None],
) -> None:
    """Call `run(name)` for every arm in a process of its own, `at_once` at a time, in order.

    run: picklable. What a process prints goes to `log.txt` in the arm's folder; meanwhile `say` gets a line on all of
    them now and then. Raises ArmFailed with the message of the first arm that failed, once the others have stopped too,
    and TrainingInterrupted after a signal: training arms save first, a second signal ends all at once. When this
    process is killed, its arms save and end as well.
    """
    waiting, running = list(folders), {}
    last = 0.0
    with StopRequest(again=lambda: _kill(running.values())) as stop:
        try:
            while (waiting or running) and not stop.is_set:
                while waiting and len(running) < at_once:
                    name = waiting.pop(0)
                    running[name] = _start(name, run, folders[name], threads=threads_each(at_once))
                time.sleep(0.2)
                for name in [name for name, arm in running.items() if arm.process.exitcode is not None]:
                    if running.pop(name).process.exitcode and not stop.is_set:
                        raise _failure(name, folders[name])
                    say(f"{name}: done")
                if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                    last = time.monotonic()
                    if lines := [line for name in running if (line := progress_of(name, folders[name]))]:
                        say("   |   ".join(lines))
            if stop.is_set:
                say("stopping: arms in training save first; the same signal again ends them at once")
        finally:
            _end(running.values())
        if stop.is_set:
            begun = [name for name in folders if name not in waiting]
            found = [_failure(name, folders[name]) for name in begun if (folders[name] / ERROR).is_file()]
            raise TrainingInterrupted(
                str(found[0]) if found else "interrupted; go on with the same command and --resume"
            )


def _start(name: str, run: Callable[[str], Any], folder: Path, *, threads: int) -> _Running:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    asked, hold = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, run, folder, asked))
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
    # Held back until the arm has said what it does with them: else Ctrl-C prints a traceback from its first imports.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINAL)
    try:
        with _environment(OMP_NUM_THREADS=str(threads)):
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        asked.close()
    return _Running(process, hold)


def _end(arms: Iterable[_Running]) -> None:
    """Ask all to stop, then wait for them."""
    for arm in arms:
        arm.hold.close()
    for arm in arms:
        arm.process.join()


def _kill(arms: Iterable[_Running]) -> None:
    for arm in arms:
        arm.process.kill()


def _child(name: str, run: Callable[[str], Any], folder: Path, asked: Any) -> None:
    for number in _OF_TERMINAL:  # the parent process gets them, too, and asks
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_TERMINAL)
    threading.Thread(target=_end_when_asked, args=(asked,), daemon=True).start()
    log = open(folder / LOG, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (open until the end)
    os.dup2(log.fileno(), sys.stdout.fileno() if _has_fileno(sys.stdout) else 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = log
    try:
        with folder_lock(folder, ARM_LOCK):  # an arm may train on after its parent was killed
            run(name)
    except UnclippedError as error:
        write_json(folder / ERROR, {"error": str(error), "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    finally:
        log.flush()


def _end_when_asked(asked: Any) -> None:
    """Wait until the parent process closes its end of the pipe, or is gone; then stop this process."""
    with contextlib.suppress(EOFError, OSError):  # nothing is ever sent
        asked.recv()
    while True:
        stop_this_process()
        time.sleep(_SECONDS_TO_SAVE)  # by then the stop has been heeded, or there is nothing left to save


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _failure(name: str, folder: Path) -> ArmFailed:
    path = folder / ERROR
    if path.is_file():
        found = read_json(path, error=UnclippedError, remedy=f"the end of {folder / LOG} says what failed")
        path.unlink()
        code = found.get("exit_code")
        return ArmFailed(f"arm {name}: {found.get('error')}", code if isinstance(code, int) else 1)
    return ArmFailed(f"arm {name}: ended without a word; the end of {folder / LOG} says more", 1)


def progress_of(name: str, folder: Path) -> str | None:
    """`name: stage step, loss`, from the last line of the arm's metrics; None when there is none yet."""
    try:
        row = newest_metrics(folder / "metrics.jsonl")
    except UnclippedError:  # the arm itself names what is wrong with its file
        return None
    if row is None or not all(isinstance(row.get(key), int | float) for key in ("step", "loss", "samples_per_second")):
        return None
    return (
        f"{name}: {row.get('stage')} step {row['step']}, loss {row['loss']:.3f}, "
        f"{row['samples_per_second']:.0f} samples/s"
    )


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def makespan(durations: Sequence[float], at_once: int) -> float:
    """How long jobs of these durations take when `at_once` run side by side, each starting when a place is free.

    >>> makespan([3.0, 1.0, 3.0], 2)
    4.0
    """
    places = [0.0] * at_once
    for duration in durations:
        places[places.index(min(places))] += duration
    return max(places)
