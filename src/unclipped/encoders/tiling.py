"""A large image in tiles: each is encoded by itself, at the size that the encoder was pretrained with, and the features
go back to their places on the page. Cost grows linearly with the page, and no patch sees beyond its tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unclipped.core.errors import UsageError
from unclipped.encoders.grouping import Grid


def parse_tile(tile: Sequence[int] | int | None) -> Grid | None:
    """(rows, columns) of patches of a tile, from two numbers or one for a square. Raises UsageError below 1."""
    if tile is None:
        return None
    sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(f"tile: expected rows and columns of patches, both at least 1, found {tile}")
    return int(sides[0]), int(sides[1])


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training, too
def tiled(frames: tuple[Grid, ...], tile: Grid) -> tuple[Tensor, Tensor, tuple[Grid, ...]]:
    """The order (sum_patches,) that brings row-major patches of `frames` into row-major patches of their tiles, the
    order back, and the grid of each tile. Tiles count from the top left; those at the right and bottom edge hold what
    is left.
    """
    order: list[Tensor] = []
    grids: list[Grid] = []
    start = 0
    for rows, columns in frames:
        places = torch.arange(start, start + rows * columns).reshape(rows, columns)
        for band in places.split(tile[0], dim=0):  # (≤ tile rows, columns)
            for piece in band.split(tile[1], dim=1):  # (≤ tile rows, ≤ tile columns)
                order.append(piece.flatten())
                grids.append((piece.shape[0], piece.shape[1]))
        start += rows * columns
    joined = torch.cat(order)
    return joined, joined.argsort(), tuple(grids)
