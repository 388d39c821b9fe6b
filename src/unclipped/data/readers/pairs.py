"""Image–caption rows: `id?, image, caption`, or `text` in the place of `caption`, with `category?` and `cluster?`."""

from __future__ import annotations

from typing import Any

from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.readers.common import Place, images_of, optional_text, required, text_of
from unclipped.data.sample import Sample, TextPart, Turn


def is_pair(row: dict[str, Any]) -> bool:
    """Whether the fields of a row are those of an image and its caption."""
    return "image" in row and ("caption" in row or "text" in row)


def parse_pair(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample that `unclipped.data.pairs.pair_of` takes.

    Raises DataError naming file, line, sample and field when the image or the caption is missing or not single.
    """
    images = images_of(required(row, "image", place), "image", place)
    if len(images) != 1:
        raise place.error("image", f"expected exactly one image, found {len(images)}")
    field = "caption" if row.get("caption") is not None else "text"
    if row.get(field) is None:
        raise _without_caption(row, place)
    caption = text_of(row[field], field, place).strip()
    if not caption:
        raise place.error(field, "the caption is empty; add the text or remove the row")
    return Sample(
        id=place.sample,
        turns=(Turn("user", (images[0],)), Turn("assistant", (TextPart(caption),))),
        category=optional_text(row, "category", place),
        answers=(caption,),
        cluster=optional_text(row, "cluster", place),
    )


def _without_caption(row: dict[str, Any], place: Place) -> DataError:
    found = ", ".join(sorted(map(str, row)))
    return place.error("caption", f"missing, and so is 'text'; found the fields {found}")
