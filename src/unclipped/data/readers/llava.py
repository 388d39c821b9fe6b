"""LLaVA rows: `{id, image?: path or list, conversations: [{from: human | gpt, value}]}`, a JSON array or JSONL.

`<image>` in a human turn says where the image stands; a row without `image` is plain text.
"""

from __future__ import annotations

from typing import Any

from unclipped.data.config import SourceConfig
from unclipped.data.readers.common import Place
from unclipped.data.readers.conversations import parse_conversation
from unclipped.data.sample import Sample


def parse_llava(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample. Raises DataError naming file, line, sample and field."""
    image_field = "image" if "image" in row or "images" not in row else "images"
    return parse_conversation(row, place, turns_field="conversations", image_field=image_field)
