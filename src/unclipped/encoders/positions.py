"""An encoder's position table brought to another side of the images, once: the new table takes the old one's place.

A family interpolates its table on the fly whenever an image has another grid, bicubically, each in its own way. Here
that interpolation is done once and kept, so features of images of the new side are the same before and after, and
training then changes the new table. The saved folder declares the new side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from unclipped.core.errors import UsageError
from unclipped.encoders.base import VisionEncoder

TABLE = "position_embeddings"


@torch.no_grad()
def resize_positions(encoder: VisionEncoder, side: int) -> tuple[int, int] | None:
    """Bring the position table of `encoder` to images of side×side px, in place, in weights, configuration and spec.

    Returns the patches a side before and after; None where nothing changes: an encoder without a table, or one that
    has this side already. Raises UsageError for a side that patches do not fill.
    """
    model: Any = encoder.model
    before = encoder.spec.image_size
    if before is None or before == (side, side):
        return None
    patch = encoder.spec.patch_size[0]
    if side % patch:
        raise UsageError(f"image_size: {side} px are no multiple of the patch of {patch}×{patch} px")
    embeddings = model.embeddings
    table, grid = getattr(embeddings, TABLE), side // patch  # (1, 1 + n, D)
    like = table.new_empty((1, 1 + grid * grid, table.shape[2]), device="meta")  # only its shape is read
    new = embeddings.interpolate_pos_encoding(like, side, side).contiguous()
    is_trained = isinstance(table, nn.Parameter)
    setattr(embeddings, TABLE, nn.Parameter(new, requires_grad=table.requires_grad) if is_trained else new)
    for part in (embeddings, embeddings.patch_embeddings):  # what the model tells itself about its images
        if hasattr(part, "image_size"):
            part.image_size = (side, side)
        if hasattr(part, "num_patches"):
            part.num_patches = grid * grid
    model.config.image_size = side
    encoder._spec = replace(encoder.spec, image_size=(side, side))
    return before[0] // patch, grid
