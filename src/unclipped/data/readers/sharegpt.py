"""ShareGPT rows in both spellings: `conversations` of from/value or `messages` of role/content, `images`, `system`.

A content may be text with `<image>` placeholders or a list of text and image parts. Tool turns are refused.
"""

from __future__ import annotations

from typing import Any

from unclipped.data.config import SourceConfig
from unclipped.data.readers.common import Place
from unclipped.data.readers.conversations import parse_conversation
from unclipped.data.sample import Sample


def parse_sharegpt(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample. Raises DataError naming file, line, sample and field."""
    turns_field = "messages" if "messages" in row else "conversations"
    image_field = "images" if "images" in row else "image"
    return parse_conversation(row, place, turns_field=turns_field, image_field=image_field)
