"""Rows of a batch under the mask of a layer's kind: causal, a sliding window, images that see themselves both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unclipped.attention.layout import Layout, Sight, window_begin

_MASK_SAMPLES = 16


@dataclass(frozen=True)
class Row:
    """One row of a batch in one forward. Positions count from the row's first token, `start` in the batch.

    Queries [first, stop) are prefill and run sparsely; [stop, end) are decoded tokens, or proposed ones, and run dense.
    """

    start: int
    layout: Layout
    first: int
    stop: int
    end: int


@dataclass(frozen=True)
class OwnMask:
    """The mask that a layer's kind has in one forward, to be asked."""

    sees: Callable[[Sequence[int]], Tensor]
    """For batch positions of queries what the mask lets them see, padding included: bool (B, positions, tokens), the
    keys counted from the batch's first token on."""
    pairs: Callable[[Tensor, Tensor], Tensor]
    """For pairs of batch positions, queries (n,) and keys (n,), whether the mask allows them: bool (B, n), padding
    aside."""
    window: int = 0
    """Sliding window that the layer states, 0 for none; a hint, since dense attention runs what the mask says."""
    dropped: int = 0
    """Tokens of the batch that stand before the first key held."""


def rows_under(rows: list[Row], mask: OwnMask) -> list[Row] | None:
    """The rows with the sight and the window that the layer's own mask says, or None when it says anything else.

    Images that see themselves both ways and sliding windows are known. The mask is asked for all keys at the borders of
    all segments and at evenly placed queries of each row, and at each query for the keys at the edges of what it should
    see, and next to it: there a border between packed documents shows, however narrow the window.
    """
    asked: set[int] = set()
    for row in rows:
        marks = [m for s in row.layout.segments for m in (s.start, s.start + s.length - 1)]
        marks += np.linspace(row.first, max(row.first, row.end - 1), _MASK_SAMPLES).astype(int).tolist()
        asked |= {row.start + mark for mark in marks if row.first <= mark < row.end}
    places = sorted(asked)
    answers = mask.sees(places).cpu().numpy()  # (B, places, tokens)
    found = []
    for b, row in enumerate(rows):
        inside = [i for i, place in enumerate(places) if row.first <= place - row.start < row.end]
        positions = np.asarray([places[i] - row.start for i in inside], dtype=np.int64)
        seen = answers[b, inside, row.start : row.start + row.end]  # (positions, tokens of the row)
        fits = (own for own in _readings(row, mask.window, positions, seen) if _says(mask, b, own, positions, seen))
        own = next(fits, None)
        if own is None:
            return None
        found.append(own)
    return found


def _readings(row: Row, stated: int, positions: np.ndarray, seen: np.ndarray) -> list[Row]:
    """What the mask of a row may mean: windows as stated and as its last query shows, with either sight."""
    windows = {0} if stated >= max(row.end, row.layout.length) else {stated}
    if len(positions) and seen[-1].any():
        first = int(seen[-1].argmax())
        windows.add(int(positions[-1]) - first + 1 if first else 0)
    sights: tuple[Sight, ...] = ("images", "causal") if row.layout.is_visual.any() else ("causal",)
    return [
        replace(row, layout=row.layout.with_sight(sight, window))
        for window in sorted(windows, reverse=True)
        for sight in sights
    ]


def _says(mask: OwnMask, batch: int, row: Row, positions: np.ndarray, seen: np.ndarray) -> bool:
    """Whether the mask of a row is what its layout says: for all keys of the sampled `positions`, (n,), of which the
    mask said `seen` (n, tokens of the row), and at the edges of what every query sees."""
    tokens, queries = np.arange(row.end), np.arange(row.first, row.end)
    begin = window_begin(tokens, row.layout.window)
    reach = tokens.copy()  # decoded tokens see themselves last
    known = min(row.end, row.layout.length)
    reach[:known] = np.minimum(row.layout.reach[:known], row.end - 1)
    if not np.array_equal(seen, (tokens >= begin[positions][:, None]) & (tokens <= reach[positions][:, None])):
        return False
    edges = [begin[queries] - 1, begin[queries], queries - 1, reach[queries], reach[queries] + 1]
    query = np.tile(queries, len(edges))
    key = np.concatenate(edges)
    held = (key >= max(0, mask.dropped - row.start)) & (key < row.end)
    query, key = query[held], key[held]
    allowed = mask.pairs(torch.from_numpy(query + row.start), torch.from_numpy(key + row.start))[batch].cpu().numpy()
    return np.array_equal(allowed, (key >= begin[query]) & (key <= reach[query]))
