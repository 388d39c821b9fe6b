"""Parquet and arrow files and saved `datasets` folders, with images as bytes, paths or an Image feature.

Columns may have any names: options of the source map `id`, `image`, `question`, `answer`, `choices`, `category`,
`cluster` or `messages` to a column; unmapped ones are found by their usual names. With a `messages` or
`conversations` column, rows are read as conversations, else as questions and answers. The options of question–answer
rows hold too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.readers import qa
from unclipped.data.readers.common import Place, RowSource
from unclipped.data.readers.conversations import parse_conversation
from unclipped.data.sample import Sample

USUAL_NAMES = {
    "id": ("id", "question_id", "sample_id"),
    "image": ("image", "images", "img", "picture"),
    "question": ("question", "query", "problem", "prompt", "instruction"),
    "answer": ("answer", "answers", "label", "response", "solution"),
    "choices": ("choices", "options"),
    "category": ("category", "type", "question_type"),
    "cluster": ("cluster",),
    "messages": ("messages", "conversations", "texts"),
}


class DatasetRows:
    """Rows of a `datasets.Dataset`; image columns stay encoded until a sample is used."""

    def __init__(self, table: Any, file: str) -> None:
        import datasets

        self.file = file
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
            elif _is_image_list(feature):
                table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self.table = table
        self.columns = tuple(table.column_names)
        if not len(table):
            raise DataError(f"{file}: the data set is empty")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.table):
            raise IndexError(f"{self.file}: row {index} out of {len(self.table)}")
        return self.table[index]

    def place(self, index: int) -> str:
        return f"row {index}"


def open_parquet(path: Path, config: SourceConfig) -> RowSource:
    """The source in a .parquet or .arrow file, a folder of them, or a folder written by `Dataset.save_to_disk`.

    Raises DataError when it cannot be read or has no usable columns, UsageError for wrong options.
    """
    rows = DatasetRows(_load(path, config), str(path))
    qa.check_options(config, (*USUAL_NAMES, *qa.OPTIONS))
    columns = _columns(rows, config)
    if "messages" not in columns and "question" not in columns:
        raise DataError(
            f"{path}: no column of questions or messages among {', '.join(rows.columns)}; "
            "name them in options, as in options: {question: COLUMN, answer: COLUMN, image: COLUMN}"
        )

    source = RowSource(rows, _Parse(columns), config)
    if path.is_dir() and config.images is None:
        source._images = path
    return source


@dataclass(frozen=True)
class _Parse:
    """Rows of named columns as samples; a class, since workers started afresh must be able to pickle it."""

    columns: dict[str, str]

    def __call__(self, row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
        named = {field: row[column] for field, column in self.columns.items()}
        if named.get("id") is not None:
            place = replace(place, sample=str(named["id"]))
        if "messages" in self.columns:
            return parse_conversation(named, place, turns_field="messages", image_field="image")
        return qa.parse_qa(named, place, config)


def _load(path: Path, config: SourceConfig) -> Any:
    import datasets

    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(path))
            if isinstance(table, datasets.DatasetDict):
                if config.split not in table:
                    raise DataError(f"{path}: no split '{config.split}'; found {', '.join(map(str, table))}")
                table = table[config.split]
            return table
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
        files = [path]
        if path.is_dir():
            files = sorted(path.rglob("*.parquet"))
            files = [file for file in files if file.name.startswith(config.split)] or files
        return datasets.Dataset.from_parquet([str(file) for file in files])
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds for damaged files
        raise DataError(
            f"{path}: cannot be read as parquet or arrow ({type(error).__name__}: {error!s:.200})"
        ) from None


def _columns(rows: DatasetRows, config: SourceConfig) -> dict[str, str]:
    """Field -> column, from the options first and the usual names next."""
    columns = {}
    for field, usual in USUAL_NAMES.items():
        wanted = config.options.get(field)
        if wanted is not None:
            if wanted not in rows.columns:
                raise UsageError(
                    f"source {config.source}: option {field}: no column '{wanted}'; found {', '.join(rows.columns)}"
                )
            columns[field] = wanted
        else:
            found = next((name for name in usual if name in rows.columns), None)
            if found is not None:
                columns[field] = found
    return columns


def _is_image_list(feature: Any) -> bool:
    import datasets

    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(inner, datasets.Image)
