"""Cambrian rows: LLaVA conversations as JSONL of millions of lines, text-only rows and system prompts among them.

Rows are read lazily by byte offset. An empty or absent `image` is a text-only row; a `<image>` left over in the text of
such a row is an error, as everywhere.
"""

from __future__ import annotations

from typing import Any

from unclipped.data.config import SourceConfig
from unclipped.data.fields import first_held
from unclipped.data.readers.common import Place
from unclipped.data.readers.conversations import parse_conversation
from unclipped.data.sample import Sample


def parse_cambrian(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample. Raises DataError naming file, line, sample and field."""
    _, system = first_held(row, ("system", "system_prompt"))
    return parse_conversation({**row, "system": system}, place, turn_fields=("conversations", "messages"))
