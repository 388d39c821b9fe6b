"""Helpers of all readers: the place of a row for errors, fields with their errors, image paths, placeholders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.fields import as_text, described, first_held, image_source, is_held, located
from unclipped.data.rows import Rows
from unclipped.data.sample import ImagePart, Part, Role, Sample, TextPart, Turn

PLACEHOLDER = "<image>"
IMAGE_FIELDS = ("image", "images")
"""Names of the field of images; in each row the first that holds something is taken."""

Piece = str | ImagePart | None
"""A stretch of a turn: text, an image named inside the turn, or None for a placeholder of the row's next image."""


@dataclass(frozen=True)
class Place:
    """Where a row is and where its images lie, so that an error can name file, line, sample and field."""

    file: str
    row: str
    images: Path
    sample: str = "?"
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field -> the row's own name for it, where the two differ."""

    def error(self, field: str, message: str) -> DataError:
        """The error about one field of this row, with or without an index such as [3]."""
        name, bracket, index = field.partition("[")
        name = self.columns.get(name, name) + bracket + index
        return DataError(f"{self.file}, {self.row}, sample {self.sample}: field '{name}': {message}")


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
        place = Place(self.name, self.rows.place(index), self._images, f"{self._stem}-{index}")
        return self.parse(row, named(place, row.get("id")), self.config)


def named(place: Place, name: Any) -> Place:
    """`place` with the row's own id, when it has one. Raises DataError for an id that is no text."""
    return replace(place, sample=text_of(name, "id", place)) if is_held(name) else place


def text_of(value: Any, field: str, place: Place) -> str:
    """`value` as text, by the rules of `as_text`. Raises DataError for what is no text."""
    return as_text(value, lambda message: place.error(field, message))


def optional_text(row: Mapping[str, Any], field: str, place: Place) -> str | None:
    """The text in `field`, or None when it holds nothing."""
    value = row.get(field)
    return text_of(value, field, place) if is_held(value) else None


def required(row: Mapping[str, Any], names: tuple[str, ...], place: Place) -> tuple[str, Any]:
    """(name, value) of the first of `names` that holds something.

    Raises DataError listing the fields found when none does.
    """
    name, value = first_held(row, names)
    if value is None:
        others = "".join(f", and so is '{other}'" for other in names if other != name)
        found = ", ".join(sorted(map(str, row))) or "none"
        raise place.error(name, f"{'empty' if name in row else 'missing'}{others}; found the fields {found}")
    return name, value


def images_of(value: Any, field: str, place: Place) -> list[ImagePart]:
    """Image parts from a path, an address, bytes, a {bytes, path} record, a Pillow image, or a list of these.

    What holds nothing gives none. Raises DataError that names the path when a file is missing.
    """
    if not is_held(value):
        return []
    if isinstance(value, list | tuple):
        return [part for item in value for part in images_of(item, field, place)]

    def refuse(message: str) -> DataError:
        return place.error(field, message)

    name = f"sample {place.sample}, {field}"
    if isinstance(value, Mapping):
        source = image_source(value, refuse)
        if source is None:
            raise place.error(field, f"expected an image path, bytes or a list of them, found {described(value)}")
        return images_of(source, field, place)
    if isinstance(value, str):
        value = located(value, refuse)
    if isinstance(value, str | Path):
        path = os.path.join(place.images, value)
        if not os.path.isfile(path):
            raise place.error(field, f"no image file {path}; correct the path, or set images to the folder it is in")
        return [ImagePart(path)]
    if isinstance(value, bytes) or (hasattr(value, "tobytes") and hasattr(value, "convert")):  # or a Pillow image
        return [ImagePart(value, name)]
    raise place.error(field, f"expected an image path, bytes or a list of them, found {described(value)}")


def pieces_of(text: str) -> list[Piece]:
    """Text cut at its placeholders."""
    pieces: list[Piece] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        pieces += [None, piece] if number else [piece]
    return pieces


def _parts(pieces: list[Piece], images: list[ImagePart]) -> tuple[Part, ...]:
    """Text and images in order, those of placeholders taken from the beginning of `images`.

    The line break between a placeholder and text belongs to the placeholder: it is dropped.
    """
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if piece is None:
            parts.append(images.pop(0))
        elif isinstance(piece, ImagePart):
            parts.append(piece)
        else:
            piece = piece.removeprefix("\n") if number and pieces[number - 1] is None else piece
            piece = piece.removesuffix("\n") if pieces[number + 1 : number + 2] == [None] else piece
            parts += [TextPart(piece)] if piece else []
    return tuple(parts)


def place_images(
    turns: Iterable[tuple[Role, list[Piece]]], images: list[ImagePart], field: str, place: Place
) -> list[Turn]:
    """Turns from (role, pieces) pairs; the placeholders become the images in order.

    Raises DataError when there are not as many placeholders as images.
    """
    turns = list(turns)
    count = sum(pieces.count(None) for _, pieces in turns)
    if count != len(images):
        raise place.error(
            field,
            f"{count} {PLACEHOLDER} placeholders in user turns but {len(images)} images; each image needs exactly one",
        )
    supply = list(images)
    return [Turn(role, _parts(pieces, supply)) for role, pieces in turns]
