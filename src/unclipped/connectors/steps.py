"""Changes of a feature grid before the projection: average merge, pixel shuffle, bilinear resampling.

Each function takes features of images of one grid, (batch, rows, columns, width), and returns the same layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.core.registry import Registry

CONNECTOR_STEPS: Registry[Callable[[Tensor, tuple[int, int]], Tensor]] = Registry("connector step")


@CONNECTOR_STEPS.register("average")
def average(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean of each block of `size` = (rows, columns) positions: (b, r, c, w) -> (b, r/size_r, c/size_c, w)."""
    batch, rows, columns, width = features.shape
    blocks = features.reshape(batch, rows // size[0], size[0], columns // size[1], size[1], width)
    return blocks.float().mean(dim=(2, 4)).to(features.dtype)


@CONNECTOR_STEPS.register("pixel_shuffle")
def pixel_shuffle(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Features of each block side by side, row-major: (b, r, c, w) -> (b, r/size_r, c/size_c, size_r*size_c*w)."""
    batch, rows, columns, width = features.shape
    blocks = features.reshape(batch, rows // size[0], size[0], columns // size[1], size[1], width)
    blocks = blocks.permute(0, 1, 3, 2, 4, 5)  # (b, r', c', size_r, size_c, w)
    return blocks.reshape(batch, rows // size[0], columns // size[1], size[0] * size[1] * width)


def unshuffle(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Exact inverse of `pixel_shuffle`: (b, r', c', size_r*size_c*w) -> (b, r'*size_r, c'*size_c, w)."""
    batch, rows, columns, width = features.shape
    blocks = features.reshape(batch, rows, columns, size[0], size[1], width // (size[0] * size[1]))
    blocks = blocks.permute(0, 1, 3, 2, 4, 5)  # (b, r', size_r, c', size_c, w)
    return blocks.reshape(batch, rows * size[0], columns * size[1], -1)


@CONNECTOR_STEPS.register("resample")
def resample(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling to a grid of `size` = (rows, columns), in fp32.

    Positions are cell centres (`align_corners=False`), and shrinking is antialiased, so that every input position
    counts: encoders of different grids then give tokens of the same places.
    """
    if features.shape[1:3] == torch.Size(size):
        return features
    planes = features.permute(0, 3, 1, 2).float()  # (b, w, r, c)
    planes = F.interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=True)
    return planes.permute(0, 2, 3, 1).to(features.dtype)
