"""ShareGPT rows: `messages` of role/content, `conversations` of from/value or `texts` of user/assistant, with `images`.

`system` is a system prompt. A content may be text with `<image>` placeholders or a list of text and image parts.
`texts` is the form of the_cauldron: the images are put before the first question. Tool turns are refused.
"""

from __future__ import annotations

from typing import Any

from unclipped.data.config import SourceConfig
from unclipped.data.readers.common import Place
from unclipped.data.readers.conversations import parse_conversation
from unclipped.data.sample import Sample


def parse_sharegpt(row: dict[str, Any], place: Place, config: SourceConfig) -> Sample:
    """One row as a sample. Raises DataError naming file, line, sample and field."""
    return parse_conversation(row, place, image_fields=("images", "image"))
