"""Patterns that differ from head to head or from layer to layer: `per_head(full | 3*window(512))`, `per_layer(…)`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from unclipped.attention.blocks import Blocks
from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Pattern, Union
from unclipped.core.errors import UsageError

if TYPE_CHECKING:
    from unclipped.attention.scoring import BlockScores


@dataclass(frozen=True)
class Listed(Pattern):
    """Base of patterns written as a list; the last entry holds for all places that follow."""

    of: ClassVar[str] = ""
    """What the entries are for."""
    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError(f"pattern {self.name}: expected at least one pattern")
        if any(type(inner) is type(self) for part in self.parts for inner in part.walk()):
            raise UsageError(f"pattern {self.name}: one {self.name} cannot stand inside another; write one list")

    @property
    def sees_itself(self) -> bool:
        return all(part.sees_itself for part in self.parts)

    @property
    def leaves_no_row_empty(self) -> bool:
        return all(part.leaves_no_row_empty for part in self.parts)

    def inner(self) -> tuple[Pattern, ...]:
        return self.parts

    def __str__(self) -> str:
        shown = []
        for part, run in groupby(self.parts):
            count = len(list(run))
            text = f"({part})" if count > 1 and isinstance(part, Union) else str(part)
            shown.append(f"{count}*{text}" if count > 1 else text)
        return f"{self.name}({' | '.join(shown)})"


@dataclass(frozen=True)
class PerHead(Listed):
    """A pattern for each key head (its group of query heads) in order; the last one for all that follow."""

    name = "per_head"
    of = "key heads"

    def for_layer(self, layer: int) -> Pattern:
        return PerHead(tuple(part.for_layer(layer) for part in self.parts))

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.stack([part.element(layout, query, key) for part in self.parts])  # (parts, Q, K)

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        heads = len(self.parts) if scores is None else scores.key.shape[0]
        results: dict[Pattern, np.ndarray] = {}
        chosen = []
        for head in range(heads):
            part = self.parts[min(head, len(self.parts) - 1)]
            if part not in results:
                results[part] = part.touches(query, key, scores)
            chosen.append(results[part][head % len(results[part])])
        return np.stack(chosen)  # (heads, nbq, nbk)


@dataclass(frozen=True)
class PerLayer(Listed):
    """A pattern for each layer in order, for example dense in the first; the last one for all that follow."""

    name = "per_layer"
    of = "layers"

    def for_layer(self, layer: int) -> Pattern:
        return self.parts[min(layer, len(self.parts) - 1)]

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        raise UsageError("pattern per_layer: it has a meaning in one layer only; take for_layer(…)")

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        raise UsageError("pattern per_layer: it has a plan in one layer only; take for_layer(…)")


def check_lists(pattern: Pattern, *, layers: int, key_heads: int) -> None:
    """Raise UsageError when a list inside `pattern` has more entries than the model has places for."""
    places = {PerLayer: layers, PerHead: key_heads}
    for inner in pattern.walk():
        if isinstance(inner, Listed) and len(inner.parts) > (there := places[type(inner)]):
            raise UsageError(
                f"pattern {inner.name}: {len(inner.parts)} patterns for the model's {there} {inner.of}; "
                f"give at most {there}"
            )
