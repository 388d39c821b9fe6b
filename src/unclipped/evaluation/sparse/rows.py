"""Measured rows kept in a file, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from unclipped.core.documents import read_jsonl
from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import append_jsonl, cut_unfinished_line


class MeasuredRows:
    """Rows by key in a JSONL file. Rows of another model are refused."""

    def __init__(
        self,
        path: str | Path,
        identity: str,
        *,
        resume: bool,
        check: Callable[[dict[str, Any]], str | None] = lambda measured: None,
    ) -> None:
        """identity: of the model. check: what is wrong with a kept row, if anything.

        Raises UsageError when kept rows are of another model, DataError for a damaged row.
        """
        self.path, self.identity = Path(path), identity
        self.rows: dict[str, dict[str, Any]] = {}
        if not resume or not self.path.exists():
            return
        cut_unfinished_line(self.path)  # an interrupted write, which is measured again
        for number, row in read_jsonl(self.path):
            place = f"{self.path}, line {number}"
            if not isinstance(row.get("key"), str) or not isinstance(row.get("measured"), dict):
                raise DataError(f"{place}: no measured row (key, measured); remove that line, and it is measured again")
            if problem := check(row["measured"]):
                raise DataError(f"{place}: {problem}; remove that line, and it is measured again")
            if row.get("model") != identity:
                raise UsageError(f"--resume: {place}: measured on another model; choose another --output")
            self.rows[row["key"]] = row["measured"]

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def add(self, key: str, measured: dict[str, Any]) -> dict[str, Any]:
        """Keep one row."""
        append_jsonl(self.path, [{"model": self.identity, "key": key, "measured": measured}])
        self.rows[key] = measured
        return measured
