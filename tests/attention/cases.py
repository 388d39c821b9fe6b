"""Layouts, patterns and a float64 oracle shared by the tests of sparse attention."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Pattern

STATIC = (
    "full",
    "window(20)",
    "sink(3) + window(5)",
    "global_text + sink + window2d(1, 2)",
    "global_text + sink + window3d(1, 1, 1)",
    "global_text + sink + same_image & grid(3)",
    "grid(2, axis=row) + window(4)",
    "same_image + window(1)",
    "global_text + sink + tiles(2, 3)",
    "per_head(window(9) | sink(2) & full + window(1))",
)
DYNAMIC = (
    "topk(2)",
    "topk(2, stride=4)",
    "mass(0.5)",
    "vertical_slash(2, 2, probes=4)",
    "random(2)",
    "per_head(topk(1) | window(9))",
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Text and images of random grids in a random order, under each rule for later tokens, with windows or without."""
    types: list[int] = []
    grids: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            types += [0] * draw(st.integers(1, 15))
        else:
            grid = (draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
            grids.append(grid)
            types += [1] * int(np.prod(grid))
    sight = draw(st.sampled_from(["causal", "images", "all"]))
    window = draw(st.sampled_from([0, 0, 1, 3, 9, 20])) if sight != "all" else 0
    return Layout.from_token_types(types, grids).with_sight(sight, window)


def naive_mask(pattern: Pattern, layout: Layout, key_block: int, query_block: int) -> np.ndarray:
    """What a plan of a static pattern attends to at least, from its exact meaning: bool (heads, N, N)."""
    everything = np.arange(layout.length)
    sight = may_see(layout)
    element = pattern.element(layout, everything, everything)
    element = (element if element.ndim == 3 else element[None]) & sight
    mask = np.zeros_like(element)
    for first in range(0, layout.length, query_block):
        rows = slice(first, first + query_block)
        for start in range(0, layout.length, key_block):
            columns = slice(start, start + key_block)
            touched = element[:, rows, columns].any(axis=(1, 2))[:, None, None]
            mask[:, rows, columns] = sight[rows, columns] & touched
        mask[:, rows, rows] = sight[rows, rows]
    return mask


def may_see(layout: Layout) -> np.ndarray:
    """Which keys a query may see at all, token by token, bool (N, N)."""
    sight = np.tril(np.ones((layout.length, layout.length), dtype=bool))
    if layout.sight == "all":
        return np.ones_like(sight)
    if layout.sight == "images":
        image = layout.image
        sight = sight | ((image[:, None] == image[None, :]) & (image[:, None] >= 0))
    return np.triu(sight, 1 - layout.window) if layout.window else sight


def attention64(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    """Attention in float64: query (H, N, d), key and value (Hkv, N, d), mask (heads or 1, N, N)."""
    group = query.shape[0] // key.shape[0]
    outputs = []
    for head, states in enumerate(query.astype(np.float64)):
        scores = states @ key[head // group].astype(np.float64).T * scale
        allowed = mask[min(head // group, len(mask) - 1)]
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(weights / weights.sum(axis=1, keepdims=True) @ value[head // group].astype(np.float64))
    return np.stack(outputs)
