"""From a path to the reader of its format: the split's file in a folder, and the format by content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unclipped.core.documents import regular_file
from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.fields import first_held, is_held
from unclipped.data.readers import qa
from unclipped.data.readers.cambrian import parse_cambrian
from unclipped.data.readers.common import Parse, RowSource
from unclipped.data.readers.conversations import TURN_FIELDS, is_exchange
from unclipped.data.readers.folder import IMAGE_SUFFIXES, FolderSource, holds
from unclipped.data.readers.llava import parse_llava
from unclipped.data.readers.pairs import is_pair, parse_pair
from unclipped.data.readers.sharegpt import parse_sharegpt
from unclipped.data.readers.tar import holds_shards, open_tar
from unclipped.data.rows import JsonlRows, open_rows
from unclipped.data.sources import Source

PARSERS: dict[str, Parse] = {
    "llava": parse_llava,
    "sharegpt": parse_sharegpt,
    "cambrian": parse_cambrian,
    "qa": qa.parse_qa,
    "pairs": parse_pair,
}
TEXT_SUFFIXES = (".txt", ".txt.gz", ".text", ".md")


def open_reader(config: SourceConfig) -> Source:
    """The source in a file or folder. Raises DataError when nothing is there or its format cannot be told."""
    path = Path(config.source)
    kind = config.format
    if kind == "text":  # may be a pattern of file names
        return _open_text(path, config)
    if holds_shards(config):  # may be a pattern too
        return open_tar(config)
    if not os.path.exists(path):
        raise DataError(f"source {path}: no such file or folder")
    if kind == "images":
        return FolderSource(config)
    if path.is_dir():
        path, kind = _file_of_split(path, config)
    else:
        regular_file(path)
    if kind == "auto":
        kind = _kind_by_name(path)
    if kind == "images":
        return FolderSource(config)
    if kind == "text":
        return _open_text(path, config)
    if kind == "parquet":
        from unclipped.data.readers.parquet import open_parquet

        return open_parquet(path, config)
    if path.is_dir():
        raise DataError(
            f"source {path}: no {config.split}.jsonl or {config.split}.json in this folder for format {kind}; "
            "name the file itself"
        )
    rows = JsonlRows(path) if kind == "cambrian" else open_rows(path)
    if kind == "auto":
        kind = kind_of_row(rows[0], str(path))
        if kind == "text":
            _check_all_text(rows, path)
    if kind == "text":
        return _open_text(path, config)
    qa.check_options(config, qa.OPTIONS if kind == "qa" else ())
    return RowSource(rows, PARSERS[kind], config)


def _check_all_text(rows: Any, path: Path) -> None:
    """Raise DataError unless every row is text alone: the text reader would drop an image or an answer of a row."""
    if path.suffix == ".json":
        raise DataError(f"{path}: an array of texts; save it as JSONL, one object with `text` a line")
    for number in range(len(rows)):
        kind = kind_of_row(rows[number], str(path))
        if kind != "text":
            raise DataError(
                f"{path}, row {number + 1}: has the fields of format {kind}, the first row those of text; put them "
                "into files of their own, or set format"
            )


def _open_text(path: Path, config: SourceConfig) -> Source:
    from unclipped.data.readers.text import TextSource

    return TextSource(path, config)


def _file_of_split(folder: Path, config: SourceConfig) -> tuple[Path, str]:
    """`<split>.jsonl`, .json or .parquet in a folder; the folder itself when it holds tables, images or text.

    With the format, as far as the folder tells it. Images win over text files beside them, which may be notes or lists
    of classes; any data file wins over images, which are then those that it names.
    """
    kind = config.format
    for suffix in (".jsonl", ".json", ".parquet"):
        if (folder / f"{config.split}{suffix}").is_file():
            return folder / f"{config.split}{suffix}", kind
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return folder, "parquet" if kind == "auto" else kind
    if kind in ("auto", "parquet") and holds(folder, (".parquet",)):
        return folder, "parquet"
    found = sorted(file.stem for pattern in ("*.jsonl", "*.json") for file in folder.glob(pattern))
    has_images = kind == "auto" and holds(folder, IMAGE_SUFFIXES)
    if has_images and not found:
        return folder, "images"
    if kind == "auto" and not has_images and any(file.name.endswith((".txt", ".txt.gz")) for file in folder.iterdir()):
        return folder, "text"
    raise DataError(
        f"source {folder}: no {config.split}.jsonl, .json or .parquet in this folder"
        + (f"; found the splits {', '.join(found)}" if found else "; it holds no data file")
        + (" and no image" if kind == "auto" and not found else "")
        + ("; set format to images to read its images alone" if has_images else "")
    )


def _kind_by_name(path: Path) -> str:
    if path.suffix in (".parquet", ".arrow"):
        return "parquet"
    return "text" if path.name.endswith(TEXT_SUFFIXES) else "auto"


def kind_of_row(row: dict[str, Any], file: str) -> str:
    """The format that the fields of the first row speak for. Raises DataError listing them when none does."""
    field, turns = first_held(row, TURN_FIELDS)
    if isinstance(turns, list) and (field != "texts" or is_exchange(turns[0])):
        with_roles = isinstance(turns[0], dict) and is_held(turns[0].get("role"))
        if field != "conversations" or with_roles or is_held(row.get("images")) or "tools" in row:
            return "sharegpt"
        return "cambrian" if "system_prompt" in row else "llava"
    if "question" in row or ("prompt" in row and any(name in row for name in qa.ANSWER_FIELDS)):
        return "qa"
    if "messages" in row or "conversations" in row:  # without a turn: the reader says so
        return "sharegpt"
    if is_pair(row):
        return "pairs"
    if isinstance(row.get("text"), str):
        return "text"
    raise DataError(
        f"{file}: cannot tell the format from the fields {', '.join(sorted(map(str, row))) or '(none)'}; expected "
        "question and answer, conversations, messages, texts, image and caption, or text. Set format if it is one of "
        "llava, sharegpt, cambrian, qa, pairs, text; a folder of images alone opens with images"
    )
