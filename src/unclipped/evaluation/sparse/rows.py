"""Measured rows kept in a file, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unclipped.core.documents import read_jsonl
from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import append_jsonl, cut_unfinished_line
from unclipped.evaluation.predictions import fingerprint

_REMEDY = "remove that line, and it is measured again"


class MeasuredRows:
    """Rows by key in a JSONL file. Rows of another model are refused."""

    def __init__(self, path: str | Path, identity: str, *, resume: bool) -> None:
        """identity: of the model.

        Raises UsageError when kept rows are of another model, DataError for a row that is not as it was written.
        """
        self.path, self.identity = Path(path), identity
        self.rows: dict[str, dict[str, Any]] = {}
        if not resume or not self.path.exists():
            return
        cut_unfinished_line(self.path)  # an interrupted write, which is measured again
        for number, row in read_jsonl(self.path, remedy=_REMEDY):
            place = f"{self.path}, line {number}"
            if row.get("digest") != fingerprint([row.get("key"), row.get("measured")]):
                raise DataError(f"{place}: not a measured row as it was written; {_REMEDY}")
            if row.get("model") != identity:
                raise UsageError(f"--resume: {place}: measured on another model; choose another --output")
            self.rows[row["key"]] = row["measured"]

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def add(self, key: str, measured: dict[str, Any]) -> dict[str, Any]:
        """Keep one row."""
        row = {"model": self.identity, "key": key, "measured": measured, "digest": fingerprint([key, measured])}
        append_jsonl(self.path, [row])
        self.rows[key] = measured
        return measured
