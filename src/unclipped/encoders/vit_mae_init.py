"""ViTMAE with its start values, which transformers leaves at zero.

In transformers 5.23 a ViTMAE built from a configuration has all-zero, frozen position tables in encoder and decoder, a
zero class token and no xavier patch embedding: its initialiser returns early when a child is flagged as initialised,
and the decoder's table is zeroed afterwards. Nothing fails; the model trains without knowing where a patch is. The
values here are those of the MAE paper (arXiv 2111.06377).
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig
from transformers import initialization as init
from transformers.models.vit_mae import modeling_vit_mae as stock

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


class ViTMAEModel(stock.ViTMAEModel):
    """The encoder of transformers with the paper's start values, also when it is built without memory (meta device)
    and initialised later. It keeps its class name, which saved configurations carry.
    """

    def __init__(self, config: ViTMAEConfig) -> None:
        super().__init__(config)
        fill_table(self.embeddings.position_embeddings.data)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, stock.ViTMAEEmbeddings):
            initialise_embeddings(module)


def initialise_vit_mae(model: ModelT) -> ModelT:
    """Give a fresh ViTMAEModel or ViTMAEForPreTraining its positions, patch embedding and tokens, in place."""
    encoder: Any = getattr(model, "vit", model)
    initialise_embeddings(encoder.embeddings)
    decoder: Any = getattr(model, "decoder", None)
    if decoder is not None:
        fill_table(decoder.decoder_pos_embed)
        init.normal_(decoder.mask_token, std=TOKEN_STD)
    return model


def initialise_embeddings(embeddings: Any) -> None:
    """Positions, patch embedding and class token of ViTMAEEmbeddings, in place; tensors that a checkpoint gave stay."""
    fill_table(embeddings.position_embeddings)
    weight = embeddings.patch_embeddings.projection.weight  # (D, C, p, p)
    fans = weight.shape[0] + weight[0].numel()  # of the linear map from a patch to its embedding
    bound = math.sqrt(3.0) * math.sqrt(2.0 / fans)  # Xavier
    init.uniform_(weight, -bound, bound)
    init.zeros_(embeddings.patch_embeddings.projection.bias)
    init.normal_(embeddings.cls_token, std=TOKEN_STD)


def fill_table(table: Tensor) -> None:
    """Write sine–cosine positions into a table (1, 1 + side², D) that no checkpoint gave; the class token's row is 0.

    Raises UsageError for a table that is not square.
    """
    side = int((table.shape[1] - 1) ** 0.5)
    if side * side != table.shape[1] - 1:
        raise UsageError(f"ViTMAE: expected a square position table, found {table.shape[1] - 1} positions")
    rows = sine_cosine_table(side, side, table.shape[2])  # (side², D)
    init.copy_(table, torch.cat((torch.zeros(1, table.shape[2]), rows))[None].to(table))
