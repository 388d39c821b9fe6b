"""What the readers share: where a row stands, fields with their errors, image paths, placeholders in text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.rows import Rows
from unclipped.data.sample import ImagePart, Part, Sample, TextPart, Turn

PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Place:
    """Where a row stands, so that an error can name file, line, sample and field; and where its images lie."""

    file: str
    row: str
    images: Path
    sample: str = "?"

    def error(self, field: str, message: str) -> DataError:
        """The error about one field of this row."""
        return DataError(f"{self.file}, {self.row}, sample {self.sample}: field '{field}': {message}")


Parse = Callable[[dict[str, Any], Place, SourceConfig], Sample]


class RowSource:
    """A source whose samples are parsed from rows one at a time, on access."""

    def __init__(self, rows: Rows, parse: Parse, config: SourceConfig) -> None:
        self.rows, self.parse, self.config = rows, parse, config
        self.name = rows.file
        self._images = Path(config.images) if config.images is not None else Path(rows.file).parent
        self._stem = Path(rows.file).name.split(".")[0]

    @property
    def length(self) -> int:
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        name = row.get("id")
        sample = f"{self._stem}-{index}" if name is None or name == "" else str(name)
        return self.parse(row, Place(self.name, self.rows.place(index), self._images, sample), self.config)


def text_of(value: Any, field: str, place: Place) -> str:
    """`value` as text; numbers are written as JSON writes them. Raises DataError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise place.error(field, f"expected text, found {described(value)}")


def optional_text(row: dict[str, Any], field: str, place: Place) -> str | None:
    """The text in `field`, or None when it is absent."""
    value = row.get(field)
    return None if value is None else text_of(value, field, place)


def required(row: dict[str, Any], field: str, place: Place) -> Any:
    """What stands in `field`. Raises DataError that lists the fields found when it is absent."""
    if row.get(field) is None:
        raise place.error(field, f"missing; found the fields {', '.join(sorted(map(str, row))) or 'none'}")
    return row[field]


def images_of(value: Any, field: str, place: Place) -> list[ImagePart]:
    """Image parts from a path, bytes, a {bytes, path} record, a Pillow image, or a list of these; None gives none.

    Raises DataError that names the path when a file is missing.
    """
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return [part for item in value for part in images_of(item, field, place)]
    if isinstance(value, str):
        path = os.path.join(place.images, value)
        if not os.path.isfile(path):
            raise place.error(field, f"no image file {path}; correct the path, or set images to the folder it is in")
        return [ImagePart(path)]
    name = f"sample {place.sample}, {field}"
    if isinstance(value, bytes):
        return [ImagePart(value, name)]
    if isinstance(value, dict) and (value.get("bytes") is not None or value.get("path") is not None):
        return images_of(value["bytes"] if value.get("bytes") is not None else value["path"], field, place)
    if not isinstance(value, dict) and hasattr(value, "tobytes") and hasattr(value, "convert"):  # a Pillow image
        return [ImagePart(value, name)]
    raise place.error(field, f"expected an image path, bytes or a list of them, found {described(value)}")


def split_placeholders(text: str, images: Iterator[ImagePart]) -> tuple[Part, ...]:
    """Text and images in order.

    The line break between a placeholder and text belongs to the placeholder: it is dropped.
    Images are taken from `images`; the caller has checked that there are as many as placeholders.
    """
    pieces = text.split(PLACEHOLDER)
    parts: list[Part] = []
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append(next(images))
            piece = piece.removeprefix("\n")
        if index < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(TextPart(piece))
    return tuple(parts)


def place_images(turns: Iterable[tuple[str, str]], images: list[ImagePart], field: str, place: Place) -> list[Turn]:
    """Turns from (role, text) pairs; `<image>` in user turns is replaced by the images in order.

    Raises DataError when the placeholders in user turns are not as many as the images.
    """
    turns = list(turns)
    count = sum(text.count(PLACEHOLDER) for role, text in turns if role == "user")
    if count != len(images):
        raise place.error(
            field,
            f"{count} {PLACEHOLDER} placeholders in user turns but {len(images)} images; each image needs exactly one",
        )
    supply = iter(images)
    built = []
    for role, text in turns:
        parts = split_placeholders(text, supply) if role == "user" else ((TextPart(text),) if text else ())
        built.append(Turn(role, parts))  # pyright: ignore[reportArgumentType]
    return built


def described(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
