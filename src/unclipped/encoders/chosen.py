"""Vision transformers on chosen patches only, as a masked autoencoder runs them (arXiv 2111.06377).

The patches that are left out cost nothing: not the embedding, not the positions, not the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def run_chosen(model: Any, patches: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """States (B, prefix + k, D) after the final norm, of patches at places `keep` of a grid of (rows, columns).

    `model`: transformers' ViT, ViTMAE, DINOv2 or DINOv2 with registers. patches (B, k, C·p·p); keep (B, k), row-major.
    """
    embeddings = model.embeddings
    projection = embeddings.patch_embeddings.projection
    # A convolution whose stride is its kernel is a linear map of the patch, in the order channel, row, column.
    hidden = F.linear(patches.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)  # (B, k, D)
    positions = _positions(embeddings, grid)  # (1 + n, D)
    hidden = hidden + positions[1:][keep]
    prefix = embeddings.cls_token + positions[:1]  # (1, 1, D)
    if (registers := getattr(embeddings, "register_tokens", None)) is not None:
        prefix = torch.cat((prefix, registers), dim=1)  # (1, 1 + R, D)
    hidden = torch.cat((prefix.expand(len(hidden), -1, -1), hidden), dim=1)  # (B, prefix + k, D)
    if (dropout := getattr(embeddings, "dropout", None)) is not None:
        hidden = dropout(hidden)
    for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
        hidden = layer(hidden, None)
    return model.layernorm(hidden)


def _positions(embeddings: Any, grid: tuple[int, int]) -> Tensor:
    """The table (1 + n, D) for a grid, the class token first; interpolated as the model does it."""
    side, (rows, columns) = embeddings.patch_embeddings.projection.kernel_size[0], grid
    table = embeddings.position_embeddings
    like = table.new_empty((1, 1 + rows * columns, table.shape[2]), device="meta")  # only its shape is read
    return embeddings.interpolate_pos_encoding(like, rows * side, columns * side)[0]
