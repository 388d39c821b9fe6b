"""Pattern files: a pattern with its block sizes and where it comes from, taken wherever a pattern's text is.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt, ValidationError

from unclipped.core.config import FrozenConfig
from unclipped.core.documents import read_yaml
from unclipped.core.errors import DataError
from unclipped.core.files import write_text

SUFFIXES = (".yaml", ".yml")
_TEXT_WIDTH = 100


class PatternFile(FrozenConfig):
    """The contents of a pattern file."""

    pattern: str = Field(min_length=1)
    """The pattern, usually `per_layer(…)`."""
    key_block: PositiveInt = 128
    """Block sizes that the pattern was chosen with; its `k` count such blocks."""
    query_block: PositiveInt = 256
    chosen: dict[str, Any] = Field(default_factory=dict)
    """How it was found and what it reached; read by people only."""


def is_pattern_file(text: str) -> bool:
    """Whether a pattern given as text names a file."""
    return text.strip().lower().endswith(SUFFIXES)


def read_pattern_file(path: str | Path) -> PatternFile:
    """Read a pattern file. Raises DataError that names the file and the field."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"pattern file {path}: No such file or directory; write one with 'unclipped prefill search'")
    try:
        held = read_yaml(path)
    except DataError as error:
        raise DataError(f"pattern file {error}") from None
    if not isinstance(held, dict):
        raise DataError(f"pattern file {path}: expected fields such as 'pattern', found {type(held).__name__}")
    try:
        return PatternFile.model_validate(held)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"pattern file {path}, field '{place}': {first['msg']}; fields are {', '.join(PatternFile.model_fields)}"
        ) from None


def write_pattern_file(path: str | Path, contents: PatternFile) -> None:
    """Write a pattern file, atomically."""
    held = contents.model_dump(mode="json")
    write_text(path, yaml.safe_dump(held, sort_keys=False, width=_TEXT_WIDTH, allow_unicode=True))
