"""Start values of a fresh ViTMAE, which transformers leaves at zero.

In transformers 5.23 a ViTMAE built from a configuration has all-zero, frozen position tables in encoder and decoder, a
zero class token and no xavier patch embedding: its initialiser returns early when a child is flagged as initialised,
and the decoder's table is zeroed afterwards. Nothing fails; the model trains without knowing where a patch is. The
values here are those of the MAE paper (arXiv 2111.06377).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unclipped.core.errors import UsageError

TOKEN_STD = 0.02
ModelT = TypeVar("ModelT", bound=nn.Module)


def sine_cosine_table(height: int, width: int, dimension: int) -> Tensor:
    """Two-dimensional sine–cosine positions, row-major: (height·width, dimension).

    The first half of the dimensions encodes the column, the second the row, each as sines then cosines: the order of
    the published MAE weights. Raises UsageError when `dimension` is not a multiple of four.
    """
    if dimension % 4:
        raise UsageError(f"sine–cosine positions: expected a width divisible by 4, found {dimension}")
    frequency = 10000.0 ** -(torch.arange(dimension // 4, dtype=torch.float64) / (dimension // 4))  # (D/4,)

    def axis(positions: Tensor) -> Tensor:
        angle = positions.flatten()[:, None] * frequency  # (h·w, D/4)
        return torch.cat((angle.sin(), angle.cos()), dim=1)  # (h·w, D/2)

    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    return torch.cat((axis(columns), axis(rows)), dim=1).float()


@torch.no_grad()
def initialise_vit_mae(model: ModelT) -> ModelT:
    """Give a fresh ViTMAEModel or ViTMAEForPreTraining its positions, patch embedding and tokens, in place."""
    encoder: Any = getattr(model, "vit", model)
    embeddings = encoder.embeddings
    fill_table(embeddings.position_embeddings)
    weight = embeddings.patch_embeddings.projection.weight  # (D, C, p, p)
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    nn.init.zeros_(embeddings.patch_embeddings.projection.bias)
    nn.init.normal_(embeddings.cls_token, std=TOKEN_STD)
    decoder: Any = getattr(model, "decoder", None)
    if decoder is not None:
        fill_table(decoder.decoder_pos_embed)
        nn.init.normal_(decoder.mask_token, std=TOKEN_STD)
    return model


def fill_table(table: Tensor) -> None:
    """Write sine–cosine positions into a table (1, 1 + side², D); the class token's row stays zero."""
    side = int((table.shape[1] - 1) ** 0.5)
    if side * side != table.shape[1] - 1:
        raise UsageError(f"ViTMAE: expected a square position table, found {table.shape[1] - 1} positions")
    table[:, 0] = 0
    table[:, 1:] = sine_cosine_table(side, side, table.shape[2]).to(table)
