"""Several arms of an experiment at the same time, each in its own process with its share of the cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unclipped.core.documents import read_json
from unclipped.core.errors import UnclippedError
from unclipped.core.files import write_json
from unclipped.core.lock import folder_lock
from unclipped.training.progress import newest_metrics

LOG, ERROR, ARM_LOCK = "log.txt", "error.json", "arm.lock"
_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_TO_SAVE = 20.0


class ArmFailed(UnclippedError):
    """An arm ended with an error; the message is its own, the exit status too."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def threads_each(at_once: int) -> int:
    """CPU threads of each of `at_once` processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // at_once)


def run_side_by_side(
    folders: dict[str, Path],
    run: Callable[[str], Any],
    *,
    at_once: int,
    say: Callable[[str], None],
) -> None:
    """Call `run(name)` for every arm in a process of its own, `at_once` at a time, in order.

    run: picklable. What a process prints goes to `log.txt` in the arm's folder; meanwhile `say` gets a line on all of
    them now and then. Raises ArmFailed with the message of the first arm that failed, once the others have stopped too.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(folders), {}
    last = 0.0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                folders[name].mkdir(parents=True, exist_ok=True)
                (folders[name] / ERROR).unlink(missing_ok=True)
                process = context.Process(target=_child, args=(name, run, folders[name]), daemon=True)
                with _environment(OMP_NUM_THREADS=str(threads_each(at_once))):
                    process.start()
                running[name] = process
            time.sleep(0.2)
            for name in [name for name, process in running.items() if process.exitcode is not None]:
                if running.pop(name).exitcode:
                    raise _failure(name, folders[name])
                say(f"{name}: done")
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                if lines := [line for name in running if (line := progress_of(name, folders[name]))]:
                    say("   |   ".join(lines))
    except BaseException as error:
        for process in running.values():
            _stop(process, was_interrupted=isinstance(error, KeyboardInterrupt))
        if isinstance(error, KeyboardInterrupt):
            for name in running:
                if (folders[name] / ERROR).is_file():
                    raise _failure(name, folders[name]) from None
        raise


def _stop(process: Any, *, was_interrupted: bool) -> None:
    """End a process, which saves first. Ctrl-C reaches it by itself; a second one would cut the saving short."""
    if was_interrupted:
        process.join(_SECONDS_TO_SAVE)
    if process.is_alive():
        os.kill(process.pid, signal.SIGINT if was_interrupted else signal.SIGTERM)
    process.join()


def _child(name: str, run: Callable[[str], Any], folder: Path) -> None:
    log = open(folder / LOG, "a", encoding="utf-8")  # noqa: SIM115 (stays open for the life of the process)
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
