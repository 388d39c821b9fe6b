"""Pattern files: a pattern with its block sizes and where it comes from, taken wherever a pattern's text is.

Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from unclipped.core.config import BlockTokens, FrozenConfig, Options, PatternText, complaint
from unclipped.core.documents import MAX_YAML_BYTES, decoded, parse_yaml, read_bytes
from unclipped.core.errors import DataError
from unclipped.core.files import write_text

SUFFIXES = (".yaml", ".yml")
_TEXT_WIDTH = 100


class PatternFile(FrozenConfig):
    """The contents of a pattern file."""

    pattern: PatternText
    """The pattern, usually `per_layer(…)`."""
    key_block: BlockTokens = 128
    """Block sizes that the pattern was chosen with; its `k` count such blocks."""
    query_block: BlockTokens = 256
    chosen: Options = Field(default_factory=dict)
    """How it was found and what it reached; read by people only."""


def is_pattern_file(text: str) -> bool:
    """Whether a pattern given as text names a file."""
    return text.strip().lower().endswith(SUFFIXES)


def read_pattern_file(path: str | Path) -> PatternFile:
    """Read a pattern file. Raises DataError that names the file and the field."""
    where = f"pattern file {path}"
    if not os.path.exists(path):
        raise DataError(f"{where}: No such file; write one with 'unclipped prefill search'")
    held = parse_yaml(decoded(read_bytes(path, limit=MAX_YAML_BYTES), where), where)
    if not isinstance(held, dict):
        raise DataError(f"{where}: expected fields such as 'pattern', found {type(held).__name__}")
    try:
        return PatternFile.model_validate(held)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        said, valid = complaint(first, PatternFile), ", ".join(PatternFile.model_fields)
        raise DataError(f"{where}, field '{place}': {said}; fields are {valid}") from None


def write_pattern_file(path: str | Path, contents: PatternFile) -> None:
    """Write a pattern file, atomically."""
    held = contents.model_dump(mode="json")
    write_text(path, yaml.safe_dump(held, sort_keys=False, width=_TEXT_WIDTH, allow_unicode=True))
