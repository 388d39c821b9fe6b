"""Progress of long work: a bar on a terminal, at most one plain line in five seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Counter:
    """Counts finished items and shows rate and time left."""

    def __init__(self, name: str, total: int, done: int, console: Console, bar: Progress | None) -> None:
        self.name, self.total, self.done, self.first = name, total, done, done
        self._console, self._bar = console, bar
        self._began = self._said = time.monotonic()
        self._task = None if bar is None else bar.add_task(name, total=total, completed=done, rate="")

    def advance(self, count: int) -> None:
        """Tell that `count` more items are finished."""
        self.done += count
        now = time.monotonic()
        rate = (self.done - self.first) / max(now - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{rate:.1f} items/s")
        elif now - self._said >= _SECONDS_BETWEEN_LINES or self.done == self.total:
            self._said = now
            left = clock((self.total - self.done) / rate) if rate else "?"
            text = f"{self.name}  {self.done}/{self.total}  {rate:.1f} items/s  {left} left"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def counting(name: str, total: int, done: int, console: Console) -> Iterator[Counter]:
    """A counter of `total` items of which `done` are behind; the bar is taken down at the end."""
    if not console.is_terminal:
        yield Counter(name, total, done, console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield Counter(name, total, done, console, bar)
