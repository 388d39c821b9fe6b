"""Measured rows kept in a file, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unclipped.core.documents import read_jsonl
from unclipped.core.errors import UsageError
from unclipped.core.files import append_jsonl


class MeasuredRows:
    """Rows by key in a JSONL file. Rows of another model are refused."""

    def __init__(self, path: str | Path, identity: str, *, resume: bool) -> None:
        """identity: of the model. Raises UsageError when kept rows are of another."""
        self.path, self.identity = Path(path), identity
        self.rows: dict[str, dict[str, Any]] = {}
        if not resume or not self.path.exists():
            return
        for number, row in read_jsonl(self.path):
            if row.get("model") != identity:
                raise UsageError(
                    f"--resume: {self.path}, line {number}: measured on another model; choose another --output"
                )
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
