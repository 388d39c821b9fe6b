"""Masks of rectangular blocks on a grid of patches (BEiT, arXiv 2106.08254, as DINOv2 uses them)."""

from __future__ import annotations

import math

import numpy as np

ASPECT = (0.3, 1 / 0.3)
SMALLEST_BLOCK = 4
_TRIES = 10


def block_mask(grid: tuple[int, int], count: int, generator: np.random.Generator) -> np.ndarray:
    """A mask (rows, columns) bool with exactly `count` patches masked, in blocks as far as they fit.

    Blocks have at least four patches (fewer are left: single patches) and an aspect ratio drawn log-uniformly from
    0.3 to 3.3. `count` must lie between 0 and the number of patches.
    """
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    while (left := count - int(mask.sum())) >= SMALLEST_BLOCK:
        for _ in range(_TRIES):
            area = generator.uniform(SMALLEST_BLOCK, left)
            aspect = math.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= height <= rows and 1 <= width <= columns):
                continue
            top, side = int(generator.integers(rows - height + 1)), int(generator.integers(columns - width + 1))
            block = mask[top : top + height, side : side + width]
            if 0 < block.size - int(block.sum()) <= left:
                block[...] = True
                break
        else:
            break
    left = count - int(mask.sum())
    if left:  # no block fits any more: single patches
        mask.flat[generator.choice(np.flatnonzero(~mask), size=left, replace=False)] = True
    return mask
