"""LLaVA rows: `{id, image?: path or list, conversations: [{from: human | gpt, value}]}`, a JSON array or JSONL.

`<image>` in a human turn is the place of the image; a row whose `image` and `images` hold nothing is plain text.
"""

from __future__ import annotations

from typing import Any

from unclipped.data.config import SourceConfig
from unclipped.data.readers.common import Place
from unclipped.data.readers.conversations import parse_conversation
from unclipped.data.sample import Sample


def parse_llava(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample. Raises DataError naming file, line, sample and field."""
    return parse_conversation(row, place, turn_fields=("conversations", "messages"))
