"""Open a generated task by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from unclipped.core.config import FrozenConfig
from unclipped.core.errors import UsageError, nearest
from unclipped.data.generated import (  # noqa: F401  (importing a generator registers it)
    captions,
    characters,
    charts,
    majority,
    needle,
    receipts,
    shapes,
    tables,
)
from unclipped.data.generated.generator import GENERATORS
from unclipped.data.generated.options import parse_options
from unclipped.data.generated.source import GeneratedSource
from unclipped.data.generated.vocabulary import SPLITS, Split


def open_generated(
    name: str, split: str, options: Mapping[str, Any] | FrozenConfig | None = None, seed: int = 0
) -> GeneratedSource:
    """An endless source of generated task `name`; split is "train", "val" or "test".

    Raises UsageError for an unknown name, split or option, and for scenes that cannot fit their image.
    """
    if split not in SPLITS:
        raise UsageError(f"generated:{name}: unknown split '{split}'; {nearest(str(split), SPLITS)}")
    parsed = parse_options(name, options or {})
    return GeneratedSource(name, GENERATORS.get(name)(parsed, cast(Split, split)), seed)
