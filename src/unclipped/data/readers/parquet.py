"""Parquet and arrow files and saved `datasets` folders, with images as bytes, paths or an Image feature.

Columns may have any names: options of the source map `id`, `image`, `question`, `answer`, `choices`, `category`,
`cluster`, `messages` or `caption` to a column; unmapped ones are found by their usual names, in each row the first that
holds something. Rows with turns are read as conversations, rows with a question as questions and answers, and with
images and captions alone as pairs. An option that names the column of captions asks for pairs whatever else is there.
The options of question–answer rows hold for these. Images beside a column of labels and none of these are images of a
class each, which becomes their category; a ClassLabel gives its names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from unclipped.core.errors import DataError, UsageError, guarded
from unclipped.data.config import SourceConfig
from unclipped.data.fields import first_held
from unclipped.data.readers import qa
from unclipped.data.readers.common import Place, RowSource, images_of, named, optional_text, required
from unclipped.data.readers.conversations import parse_conversation
from unclipped.data.readers.folder import SPLIT_NAMES
from unclipped.data.readers.pairs import parse_pair
from unclipped.data.sample import Sample

Kind = Literal["messages", "qa", "pairs", "labels"]

USUAL_NAMES = {
    "id": ("id", "question_id", "sample_id"),
    "image": ("image", "images", "img", "picture"),
    "question": ("question", "query", "problem", "prompt", "instruction"),
    "answer": ("answer", "answers", "label", "response", "solution"),
    "choices": ("choices", "options"),
    "category": ("category", "type", "question_type", "class", "labels"),
    "cluster": ("cluster",),
    "messages": ("messages", "conversations", "texts"),
    "caption": ("caption", "captions", "text", "alt_text", "alt", "description"),
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
        self.class_names = {
            name: tuple(feature.names)
            for name, feature in table.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        if not len(table):
            raise DataError(f"{file}: the data set is empty")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.table):
            raise IndexError(f"{self.file}: row {index} out of {len(self.table)}")
        with guarded(
            lambda reason: DataError(f"{self.file}, {self.place(index)}: cannot be read ({reason}); repair the file")
        ):
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
    kind = _kind_of(set(columns), config)
    if kind is None:
        raise DataError(
            f"{path}: no column of questions or messages, and no image with a caption or label, among "
            f"{', '.join(rows.columns)}; name them in options, as in options: {{question: COLUMN, answer: COLUMN, "
            "image: COLUMN}, {image: COLUMN, caption: COLUMN} or {image: COLUMN, category: COLUMN}"
        )
    if kind == "pairs" and (unused := [name for name in qa.OPTIONS if name in config.options]):
        raise UsageError(f"source {config.source}: option {unused[0]}: pairs have no question and no answer; remove it")
    if kind != "pairs":
        columns.pop("caption", None)
    if kind == "labels" and "answer" in columns and "category" not in config.options:
        columns["category"] = columns.pop("answer")
    source = RowSource(rows, _Parse(columns, kind, rows.class_names), config)
    if path.is_dir() and config.images is None:
        source._images = path
    return source


@dataclass(frozen=True)
class _Parse:
    """Rows of named columns as samples; a class, since workers started afresh must be able to pickle it."""

    columns: dict[str, tuple[str, ...]]
    """Field -> the columns that may hold it; in each row the first that holds something is taken."""
    kind: Kind
    class_names: dict[str, tuple[str, ...]]
    """Names of the classes of a ClassLabel column, which holds their numbers."""

    def __call__(self, row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
        fields: dict[str, Any] = {}
        names: dict[str, str] = {}
        for field, columns in self.columns.items():
            names[field], fields[field] = first_held({name: self._value(row, name) for name in columns}, columns)
        place = named(replace(place, columns=names), fields.get("id"))
        kind = self.kind
        if kind in ("messages", "qa"):  # a table may hold both, each in some of its rows
            kind = (
                "messages"
                if fields.get("messages") is not None
                else "qa"
                if fields.get("question") is not None
                else kind
            )
        if kind == "labels":
            return _labelled(fields, place)
        if kind == "pairs":
            return parse_pair(fields, place, config)
        if kind == "messages":
            return parse_conversation(fields, place, turn_fields=("messages",))
        return qa.parse_qa(fields, place, config)

    def _value(self, row: dict[str, Any], column: str) -> Any:
        value, names = row[column], self.class_names.get(column)
        if names is None or not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None  # -1 stands for no label


def _labelled(fields: dict[str, Any], place: Place) -> Sample:
    """An image of a class. Raises DataError for a row without its one image or without its label."""
    images = images_of(required(fields, ("image",), place)[1], "image", place)
    if len(images) != 1:
        raise place.error("image", f"expected exactly one image, found {len(images)}")
    category = optional_text(fields, "category", place)
    if category is None:
        raise place.error("category", "the image has no label; add it or remove the row")
    return Sample.picture(place.sample, images[0], category=category)


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
            files = _files_of_split(path, sorted(path.rglob("*.parquet")), config.split)
        return datasets.Dataset.from_parquet([str(file) for file in files])
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds for damaged files
        raise DataError(
            f"{path}: cannot be read as parquet or arrow ({type(error).__name__}: {error!s:.200})"
        ) from None


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files whose name, or that of a folder around them, begins with the split; all where names speak of none.

    Raises DataError when they speak of other splits only.
    """

    def begins(file: Path, names: str | tuple[str, ...]) -> bool:
        return any(part.startswith(names) for part in file.relative_to(folder).parts)

    chosen = [file for file in files if begins(file, split)]
    if not chosen and any(begins(file, SPLIT_NAMES) for file in files):
        found = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        raise DataError(f"{folder}: no file of the split '{split}'; found {found}")
    return chosen or files


def _columns(rows: DatasetRows, config: SourceConfig) -> dict[str, tuple[str, ...]]:
    """Field -> columns: the one that the options name, else all of the usual names that the table has."""
    columns: dict[str, tuple[str, ...]] = {}
    for field, usual in USUAL_NAMES.items():
        wanted = config.options.get(field)
        if wanted is not None:
            if wanted not in rows.columns:
                raise UsageError(
                    f"source {config.source}: option {field}: no column '{wanted}'; found {', '.join(rows.columns)}"
                )
            columns[field] = (wanted,)
        elif found := tuple(name for name in usual if name in rows.columns):
            columns[field] = found
    return columns


def _kind_of(columns: set[str], config: SourceConfig) -> Kind | None:
    """How rows of these columns are read; None when they hold nothing to read.

    Raises UsageError when captions are asked for and there is no image.
    """
    is_pair = "image" in columns and "caption" in columns
    if "caption" in config.options:
        if not is_pair:
            raise UsageError(
                f"source {config.source}: option caption: a caption needs an image, and no column is known to hold it; "
                "name it, as in options: {image: COLUMN, caption: COLUMN}"
            )
        return "pairs"
    if "messages" in columns:
        return "messages"
    if "question" in columns:
        return "qa"
    if is_pair:
        return "pairs"
    return "labels" if "image" in columns and ("answer" in columns or "category" in columns) else None


def _is_image_list(feature: Any) -> bool:
    import datasets

    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(inner, datasets.Image)
