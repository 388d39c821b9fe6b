"""Patterns: immutable values that say which keys a query may attend to, composable by `+` (union) and `&`.

A static pattern knows this from the layout. `element` is its exact meaning, token by token; `touches` says which
blocks of keys hold anything for a block of queries, from bounds of coordinates alone. Plans attend to touched blocks
whole, so `touches` may say yes too often (that costs time) and never no too often. Causality is not a pattern's affair:
plans add it. Dynamic patterns (`scoring.py`) choose blocks from queries and keys. A result of `element` or `touches`
with an axis of heads holds for the key heads in order, its last entry for all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from unclipped.attention.blocks import Blocks, overlap
from unclipped.attention.layout import Layout
from unclipped.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from unclipped.attention.scoring import BlockScores

PATTERNS: dict[str, type[Pattern]] = {}
MOST = 2**31 - 1
"""Largest value of a parameter: distances and counts fit 32 bits."""


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns. `str(pattern)` is its text, which `parse_pattern` reads back to an equal value."""

    name: ClassVar[str] = ""
    smallest: ClassVar[dict[str, float]] = {}
    """Least value of a parameter where it is not 1."""
    needs_grid: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            PATTERNS[cls.name] = cls

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = self.smallest.get(item.name, 1)
            if isinstance(value, (int, float)) and not value >= least:
                raise UsageError(f"pattern {self.name}: {item.name} must be at least {least:g}, found {value}")
            if isinstance(value, (int, float)) and value > MOST:
                raise UsageError(f"pattern {self.name}: {item.name} must be at most {MOST:,}, found {value}")

    @property
    def is_dynamic(self) -> bool:
        """Whether the choice depends on queries and keys."""
        return any(part.is_dynamic for part in self.inner())

    @property
    def sees_itself(self) -> bool:
        """Whether every token is among its own keys, whatever the layout."""
        return False

    @property
    def leaves_no_row_empty(self) -> bool:
        """Whether every token has a key that is no later than itself, whatever the layout."""
        return self.sees_itself

    def inner(self) -> tuple[Pattern, ...]:
        """The patterns that this one is made of."""
        return ()

    def walk(self) -> Iterator[Pattern]:
        """This pattern and all inside it."""
        yield self
        for part in self.inner():
            yield from part.walk()

    def for_layer(self, layer: int) -> Pattern:
        """What the pattern is in one layer."""
        return self

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Exact meaning for positions: query (Q,), key (K,) → bool (Q, K) or (heads, Q, K). Static patterns only."""
        raise UsageError(f"pattern {self.name} chooses blocks from queries and keys; it has no meaning token by token")

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        """Which key blocks hold something for which query blocks: bool (heads or 1, query blocks, key blocks)."""
        raise NotImplementedError(type(self).__name__)

    def __add__(self, other: Pattern) -> Pattern:
        return Union(_flat(self, Union) + _flat(other, Union))

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(_flat(self, Intersection) + _flat(other, Intersection))

    def __str__(self) -> str:
        values = [(item, getattr(self, item.name)) for item in fields(self)]
        shown = [
            f"{item.name}={value:g}" if isinstance(value, float) else f"{item.name}={value}"
            for item, value in values
            if value != item.default
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def _flat(pattern: Pattern, kind: type[Union] | type[Intersection]) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, kind) else (pattern,)


def combine(operation: Callable[[np.ndarray, np.ndarray], np.ndarray], results: Sequence[np.ndarray]) -> np.ndarray:
    """Results of `element` or `touches` joined; those with fewer heads repeat their last."""
    if len({result.shape for result in results}) > 1:
        results = [result if result.ndim == 3 else result[None] for result in results]
        heads = max(len(result) for result in results)
        results = [fill_heads(result, heads) for result in results]
    return reduce(operation, results)


def fill_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """(fewer heads, …) → (heads, …), the last one repeated; a single one is left to broadcasting."""
    if len(values) in (1, heads):
        return values
    return values[np.minimum(np.arange(heads), len(values) - 1)]


@dataclass(frozen=True)
class Union(Pattern):
    """What any of the parts allows."""

    parts: tuple[Pattern, ...]

    @property
    def sees_itself(self) -> bool:
        return any(part.sees_itself for part in self.parts)

    @property
    def leaves_no_row_empty(self) -> bool:
        return any(part.leaves_no_row_empty for part in self.parts)

    def inner(self) -> tuple[Pattern, ...]:
        return self.parts

    def for_layer(self, layer: int) -> Pattern:
        return reduce(lambda left, right: left + right, [part.for_layer(layer) for part in self.parts])

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return combine(np.logical_or, [part.element(layout, query, key) for part in self.parts])

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        return combine(np.logical_or, [part.touches(query, key, scores) for part in self.parts])

    def __str__(self) -> str:
        return " + ".join(str(part) for part in self.parts)


@dataclass(frozen=True)
class Intersection(Pattern):
    """What all of the parts allow."""

    parts: tuple[Pattern, ...]

    @property
    def sees_itself(self) -> bool:
        return all(part.sees_itself for part in self.parts)

    def inner(self) -> tuple[Pattern, ...]:
        return self.parts

    def for_layer(self, layer: int) -> Pattern:
        return reduce(lambda left, right: left & right, [part.for_layer(layer) for part in self.parts])

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return combine(np.logical_and, [part.element(layout, query, key) for part in self.parts])

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        return combine(np.logical_and, [part.touches(query, key, scores) for part in self.parts])

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Union) else str(part) for part in self.parts)


@dataclass(frozen=True)
class Full(Pattern):
    """Every key: dense attention."""

    name = "full"

    @property
    def sees_itself(self) -> bool:
        return True

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.ones((len(query), len(key)), dtype=bool)

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        return np.ones((1, query.count, key.count), dtype=bool)


@dataclass(frozen=True)
class Window(Pattern):
    """The last `size` tokens, the query's own among them; as many later ones where later tokens may be seen."""

    name = "window"
    size: int

    @property
    def sees_itself(self) -> bool:
        return True

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.abs(query[:, None] - key[None, :]) < self.size

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        return overlap((query.first, query.last), (key.first, key.last), self.size - 1)[None]


@dataclass(frozen=True)
class Sink(Pattern):
    """The first `size` tokens of the row."""

    name = "sink"
    size: int = 1

    @property
    def leaves_no_row_empty(self) -> bool:
        return True

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.broadcast_to(key[None, :] < self.size, (len(query), len(key)))

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        return np.broadcast_to(key.first[None, :] < self.size, (query.count, key.count))[None]


@dataclass(frozen=True)
class GlobalText(Pattern):
    """Text queries see every key, and every query sees text keys."""

    name = "global_text"

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        text = ~layout.is_visual
        return text[query][:, None] | text[key][None, :]

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        return (query.has_text[:, None] | key.has_text[None, :])[None]


@dataclass(frozen=True)
class SameImage(Pattern):
    """Visual tokens of one image see each other."""

    name = "same_image"

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        image = layout.image
        return (image[query][:, None] == image[key][None, :]) & layout.is_visual[query][:, None]

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        both = query.has_visual[:, None] & key.has_visual[None, :]
        return (both & overlap(query.image, key.image))[None]


@dataclass(frozen=True)
class Window3D(Pattern):
    """Visual tokens of one image at most so many frames, rows and columns apart."""

    name = "window3d"
    needs_grid = True
    smallest = {"frames": 0, "rows": 0, "columns": 0}  # noqa: RUF012
    frames: int
    rows: int
    columns: int

    def _reach(self) -> tuple[int, int, int]:
        return self.frames, self.rows, self.columns

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        result = SameImage().element(layout, query, key)
        for axis, reach in zip(layout.places, self._reach(), strict=True):
            result = result & (np.abs(axis[query][:, None] - axis[key][None, :]) <= reach)
        return result

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        result = SameImage().touches(query, key)
        for own, other, reach in zip(query.places, key.places, self._reach(), strict=True):
            result = result & overlap(own, other, reach)
        return result


@dataclass(frozen=True)
class Window2D(Pattern):
    """Visual tokens of one frame at most so many rows and columns apart."""

    name = "window2d"
    needs_grid = True
    smallest = {"rows": 0, "columns": 0}  # noqa: RUF012
    rows: int
    columns: int

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return Window3D(0, self.rows, self.columns).element(layout, query, key)

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        return Window3D(0, self.rows, self.columns).touches(query, key)


@dataclass(frozen=True)
class Tiles(Pattern):
    """Visual tokens of one frame in the same tile of rows × columns; tiles at the right and lower edge are smaller."""

    name = "tiles"
    needs_grid = True
    rows: int
    columns: int

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        result = SameImage().element(layout, query, key)
        for axis, size in zip(layout.places, (1, self.rows, self.columns), strict=True):
            tile = axis // size
            result = result & (tile[query][:, None] == tile[key][None, :])
        return result

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        result = SameImage().touches(query, key)
        for own, other, size in zip(query.places, key.places, (1, self.rows, self.columns), strict=True):
            tile, other_tile = ((low // size, high // size) for low, high in (own, other))
            result = result & overlap(tile, other_tile)
        return result


AXES = {"frame": 0, "row": 1, "column": 2}


@dataclass(frozen=True)
class Grid(Pattern):
    """Visual tokens of one image whose place along `axis` (frame, row or column) differs by a multiple of `stride`."""

    name = "grid"
    needs_grid = True
    stride: int
    axis: str = "column"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in AXES:
            raise UsageError(f"pattern grid: unknown axis '{self.axis}'; {nearest(self.axis, AXES)}")

    def element(self, layout: Layout, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        place = layout.places[AXES[self.axis]]
        aligned = (place[query][:, None] - place[key][None, :]) % self.stride == 0
        return aligned & SameImage().element(layout, query, key)

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        own, other = query.places[AXES[self.axis]], key.places[AXES[self.axis]]
        low = own[0][:, None].astype(np.int64) - other[1][None, :]
        high = own[1][:, None].astype(np.int64) - other[0][None, :]
        return SameImage().touches(query, key) & (high // self.stride * self.stride >= low)[None]
