"""Image–caption rows: `id?, image, caption`, with `category?` and `cluster?`.

`images` and `text` are read where `image` or `caption` holds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclipped.data.config import SourceConfig
from unclipped.data.fields import first_held, is_held
from unclipped.data.readers.common import IMAGE_FIELDS, Place, images_of, optional_text, required, text_of
from unclipped.data.sample import Sample, TextPart, Turn

CAPTION_FIELDS = ("caption", "text")


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether the fields of a row are those of an image and its caption."""
    return ("image" in row or is_held(row.get("images"))) and any(name in row for name in CAPTION_FIELDS)


def parse_pair(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample that `unclipped.data.pairs.pair_of` takes.

    Raises DataError naming file, line, sample and field when the image or the caption is missing or not single.
    """
    field, value = first_held(row, IMAGE_FIELDS) if is_pair(row) else required(row, IMAGE_FIELDS, place)
    images = images_of(value, field, place)
    if len(images) != 1:
        raise place.error(field, f"expected exactly one image, found {len(images)}")
    field, value = first_held(row, CAPTION_FIELDS)
    if isinstance(row.get(field), str) and value is None:
        raise place.error(field, "the caption is empty; add the text or remove the row")
    field, value = required(row, CAPTION_FIELDS, place)
    caption = text_of(value, field, place).strip()
    return Sample(
        id=place.sample,
        turns=(Turn("user", (images[0],)), Turn("assistant", (TextPart(caption),))),
        category=optional_text(row, "category", place),
        answers=(caption,),
        cluster=optional_text(row, "cluster", place),
    )
