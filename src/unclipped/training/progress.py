"""What a run says while it goes: rows of metrics in a file, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from unclipped.core.documents import parse_json, read_jsonl
from unclipped.core.errors import DataError
from unclipped.core.files import append_jsonl, cut_unfinished_line, write_text


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> clock(75), clock(3725)
    ('1:15', '1:02:05')
    """
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def short(number: float) -> str:
    """A rate with its thousands shortened: 950, 12.3k, 4.56M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Raises DataError that names the line which is none."""
    rows = read_jsonl(path, remedy="remove that line, or start a new run in another folder")
    return [_checked(row, f"{path}, line {number}") for number, row in rows]


def newest_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole row of a metrics.jsonl, which may be written at this moment; None when there is none
    yet or it is not whole.

    Raises DataError when it is no JSON object.
    """
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = stream.read()
    except OSError:
        return None
    if not tail.endswith(b"\n"):
        return None
    return parse_json(tail[tail.rfind(b"\n", 0, -1) + 1 :], str(path), root=dict)


_TAIL_BYTES = 1 << 20
_KINDS = {
    "stage_index": int, "stage": str, "step": int, "loss": int | float, "parts": dict, "learning_rates": dict,
    "gradient_norm": int | float, "samples_per_second": int | float,
}  # fmt: skip
_OPTIONAL = {"health": dict, "warnings": list, "gradient_norms": dict, "schedules": dict}


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    wrong = [name for name, kind in _KINDS.items() if not isinstance(row.get(name), kind)]
    wrong += [name for name, kind in _OPTIONAL.items() if name in row and not isinstance(row[name], kind)]
    if wrong:
        raise DataError(
            f"{where}: no row of metrics ({', '.join(wrong)} missing or of another kind); remove that line, or start a "
            "new run in another folder"
        )
    return row


class Reporter:
    """Writes `metrics.jsonl` and shows progress; silent on every process but the first."""

    def __init__(self, metrics_file: Path, *, is_first_process: bool = True, console: Console | None = None) -> None:
        self.metrics_file, self.is_first_process = metrics_file, is_first_process
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        if self.is_first_process:
            self.console.print(text, markup=False)

    def parameter_table(self, stage: str, table: dict[str, dict[str, int]]) -> None:
        """Print trainable and total parameters of each part."""
        if not self.is_first_process:
            return
        view = Table(title=f"stage {stage}: parameters", title_justify="left")
        for heading in ("part", "trained", "total", "share"):
            view.add_column(heading, justify="left" if heading == "part" else "right")
        for part, row in table.items():
            share = row["trainable"] / row["total"] if row["total"] else 0.0
            view.add_row(part, f"{row['trainable']:,}", f"{row['total']:,}", f"{share:.1%}")
        self.console.print(view)

    def rows(self) -> list[dict[str, Any]]:
        """Rows written so far, on the first process; a last line that was cut short is removed.

        Raises DataError for a damaged file.
        """
        if not self.is_first_process or not self.metrics_file.exists():
            return []
        if cut := cut_unfinished_line(self.metrics_file):
            self.say(f"{self.metrics_file}: a last line that was cut short is removed ({cut:,} bytes)")
        return read_metrics(self.metrics_file)

    def forget_after(self, stage_index: int, step: int) -> None:
        """Remove rows later than a checkpoint, which a resumed run writes again, and say when earlier ones are gone."""
        if not self.is_first_process:
            return
        kept = [row for row in self.rows() if (row["stage_index"], row["step"]) <= (stage_index, step)]
        if not kept and (stage_index, step) > (0, 0):
            self.say(f"{self.metrics_file}: holds no row from before the checkpoint")
        if self.metrics_file.exists():
            write_text(self.metrics_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def start_stage(self, stage: str, steps: int, done: int = 0) -> None:
        """Begin a bar (terminal) for `steps` steps of which `done` are behind."""
        if not self.is_first_process or not self.console.is_terminal:
            return
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=self.console
        )
        self._task = progress.add_task(stage, total=steps, completed=done, text="")
        progress.start()
        self._progress = progress

    def log(self, row: dict[str, Any], *, steps: int, seconds_left: float) -> None:
        """Write a row of metrics and show it."""
        if not self.is_first_process:
            return
        append_jsonl(self.metrics_file, [row])
        text = (
            f"loss {row['loss']:.4f}  {short(row['samples_per_second'])} samples/s  "
            f"{short(row['tokens_per_second'])} tokens/s  {clock(seconds_left)} left"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=row["step"], text=f"{row['step']}/{steps}  {text}")
            return
        now = time.monotonic()
        if now - self._last_line >= 5.0 or row["step"] == steps:  # plain lines: at most one in five seconds
            self._last_line = now
            self.say(f"{row['stage']}  step {row['step']}/{steps}  {text}")

    def end_stage(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None
