"""Bounds of blocks of tokens: what a pattern needs to know of a block without looking at its tokens one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unclipped.attention.layout import Layout

Bounds = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Blocks:
    """A layout cut into blocks of `size` tokens; the last may be shorter. Bounds are inclusive, one value a block.

    Blocks [begin, end) of it only (end 0: to the last); their bounds are those that they have in the whole row.
    """

    layout: Layout
    size: int
    begin: int = 0
    end: int = 0

    @cached_property
    def count(self) -> int:
        return (self.end or -(-self.layout.length // self.size)) - self.begin

    @cached_property
    def first(self) -> np.ndarray:
        """First token of each block, (blocks,)."""
        return np.arange(self.begin, self.begin + self.count) * self.size

    @cached_property
    def last(self) -> np.ndarray:
        """Last token of each block, (blocks,)."""
        return np.minimum(self.first + self.size, self.layout.length) - 1

    @cached_property
    def has_text(self) -> np.ndarray:
        """Whether a block holds a text token, (blocks,)."""
        return self._reduce(np.logical_or, ~self.layout.is_visual)

    @cached_property
    def has_visual(self) -> np.ndarray:
        """Whether a block holds a visual token, (blocks,)."""
        return self._reduce(np.logical_or, self.layout.is_visual)

    @cached_property
    def image(self) -> Bounds:
        """Lowest and highest image of the visual tokens of each block. Blocks without any have no meaningful bounds."""
        return self._bounds(self.layout.image)

    @cached_property
    def places(self) -> tuple[Bounds, Bounds, Bounds]:
        """Bounds of frame, row and column of the visual tokens of each block, as `image`."""
        frames, rows, columns = (self._bounds(axis) for axis in self.layout.places)
        return frames, rows, columns

    def _bounds(self, values: np.ndarray) -> Bounds:
        visual, far = self.layout.is_visual, np.iinfo(np.int32).max
        low = self._reduce(np.minimum, np.where(visual, values, far))
        high = self._reduce(np.maximum, np.where(visual, values, -1))
        return low, high

    def _reduce(self, operation: np.ufunc, values: np.ndarray) -> np.ndarray:
        stop = (self.begin + self.count) * self.size
        return operation.reduceat(values[:stop], self.first)


def overlap(query: Bounds, key: Bounds, reach: int = 0) -> np.ndarray:
    """Whether some pair of values from two blocks' bounds is at most `reach` apart, bool (query blocks, key blocks)."""
    return (query[0][:, None] <= key[1][None, :] + reach) & (key[0][None, :] <= query[1][:, None] + reach)
