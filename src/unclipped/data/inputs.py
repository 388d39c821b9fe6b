"""Inputs of a run: the data files, images and model folders that a configuration names, with digests to compare later.

`inputs.json` in a run folder holds them as they were when the run began. Whatever resumes the run or takes over a part
of it compares first, so that results of two states of the data are never mixed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from unclipped.core.digest import changes_between, describe_files, listed_changes
from unclipped.core.documents import read_json
from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import write_json
from unclipped.data.config import SourceConfig
from unclipped.data.readers.folder import IMAGE_SUFFIXES, SPLIT_NAMES, walk
from unclipped.data.readers.opening import TEXT_SUFFIXES, open_reader
from unclipped.data.sources import expanded

INPUTS_FILE = "inputs.json"
_DATA_SUFFIXES = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, ".json", ".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".tar")
_MODEL_SUFFIXES = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt")
_FILE_SUFFIXES = (*_MODEL_SUFFIXES, ".gguf", ".yaml", ".yml")
_ROWS = 100_000
"""Rows of a file whose images are looked at; of a longer file so many, evenly spread."""


def check_inputs(folder: Path, config: Any, *, resume: bool) -> bool:
    """Compare the files that `config` names with inputs.json in `folder`, and write them there.

    config: anything made of configurations, lists and names of models. Returns whether there was something to compare
    with. Raises UsageError that names what changed, DataError for files that cannot be read and a damaged inputs.json.
    """
    path = folder / INPUTS_FILE
    known = read_inputs(path) if path.exists() else {}
    found = {label: describe_files(files) for label, files in files_of(config).items()}
    changed = [
        f"{label}: {listed_changes(changes)}"
        for label, group in found.items()
        if resume and label in known and (changes := changes_between(known[label], group))
    ]
    if changed:
        raise UsageError(
            f"--resume: files changed since {folder} was begun: {'; '.join(changed)}. Put them back, or start "
            "a new run in another --output"
        )
    if known | found != known:
        write_json(path, {"inputs": known | found})
    return bool(known) or not found


def read_inputs(path: Path) -> dict[str, dict[str, Any]]:
    """The groups of files in an inputs.json. Raises DataError when it is damaged."""
    groups = read_json(path, remedy="start a new run in another folder").get("inputs")
    if not isinstance(groups, dict) or not all(
        isinstance(group, dict) and isinstance(group.get("digest"), str) for group in groups.values()
    ):
        raise DataError(f"{path}: holds no digests of files; start a new run in another folder")
    return groups


def files_of(config: Any) -> dict[str, dict[str, Path]]:
    """{what the configuration names: {file: path}} of every source, model folder and other file in `config`.

    Generated sources and models of a hub have none. Images that the rows of a JSON file name are a group of their own.
    """
    found: dict[str, dict[str, Path]] = {}
    for field, value in _named(config):
        groups = _of_source(value) if isinstance(value, SourceConfig) else _of_path(value, is_data=field == "source")
        for label, files in groups.items():
            found.setdefault(label, {}).update(files)
    return {label: files for label, files in found.items() if files}


def _named(value: Any, field: str = "") -> Iterator[tuple[str, SourceConfig | str]]:
    """(field, source or text) of a configuration, from the outside in."""
    if isinstance(value, SourceConfig | str):
        yield field, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _named(getattr(value, name), name)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _named(item, str(name))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _named(item, field)


def _of_path(text: str, *, is_data: bool) -> dict[str, dict[str, Path]]:
    """Files of a text that names a file, a model folder or, where data is named, a folder; none of another text."""
    path = os.path.expanduser(os.path.expandvars(text.removeprefix("llm:")))
    folder = Path(path)
    if os.path.isfile(path):
        return {text: {folder.name: folder}} if path.endswith((*_FILE_SUFFIXES, *_DATA_SUFFIXES)) else {}
    if not os.path.isdir(path):
        return {}
    if is_data:
        return {text: _below(folder, _DATA_SUFFIXES)}
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return {text: _below(folder, _MODEL_SUFFIXES)} if is_model else {}


def _below(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    return {
        os.path.join(inner, name): folder / inner / name
        for inner, names in walk(folder)
        for name in names
        if name.lower().endswith(suffixes)
    }


def _of_source(config: SourceConfig) -> dict[str, dict[str, Path]]:
    if config.source.startswith("generated:"):
        return {}
    config = config.model_copy(
        update={"source": expanded(config.source), "images": config.images and expanded(config.images)}
    )
    path, label = Path(config.source), config.source
    if path.is_dir():
        tables = [path / f"{config.split}{suffix}" for suffix in (".jsonl", ".json", ".parquet")]
        table = next((file for file in tables if file.is_file()), None)
        if table is None or config.format in ("images", "text"):
            return {f"{label} ({config.split})": _of_split(_below(path, _DATA_SUFFIXES), config.split)}
        path = table
    if not path.exists():  # a pattern of file names
        files = getattr(open_reader(config), "files", ())
        return {label: {str(file): Path(file) for file in files}}
    images = _images_of_rows(config) if path.suffix in (".json", ".jsonl") else {}
    return {str(path): {path.name: path}, f"images of {path}": images}


def _of_split(files: dict[str, Path], split: str) -> dict[str, Path]:
    """The files of a split, where a folder is divided into splits by the beginnings of names; else all files."""
    own = {name: path for name, path in files.items() if name.lower().startswith(split)}
    others = {name for name in files if name.lower().startswith(SPLIT_NAMES)} - set(own)
    return own if own and others else files


def _images_of_rows(config: SourceConfig) -> dict[str, Path]:
    """Image files that the rows of a JSON or JSONL file name. Rows that cannot be used have none."""
    source, found = open_reader(config), {}
    count = source.length or 0
    for index in range(0, count, -(-count // _ROWS) or 1):
        try:
            parts = source[index].images
        except DataError:
            continue  # training and evaluation name this row, or skip and count it
        found |= {str(part.source): Path(part.source) for part in parts if isinstance(part.source, str | Path)}
    return found
