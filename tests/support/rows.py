"""Rows written as JSON Lines or parquet and opened, and the one line that reading them raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.sources import Source, open_source


def as_jsonl(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Source:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceConfig(source=str(path), **fields))


def as_parquet(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Source:
    datasets = pytest.importorskip("datasets")
    path = folder / "train.parquet"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys}).to_parquet(str(path))
    return open_source(SourceConfig(source=str(path), **fields))


WRITERS = pytest.mark.parametrize("write", [as_jsonl, as_parquet], ids=["jsonl", "parquet"])


def error_of(source: Source, index: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        source[index]
    assert "\n" not in str(caught.value)
    return str(caught.value)
