"""A transformer over captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unclipped.objectives.pairs_config import PairsConfig

STD = 0.02


@dataclass
class TextOutput:
    """What a tower makes of B captions."""

    pooled: Tensor
    """(B, W): one feature a caption, after the final norm."""
    states: Tensor
    """(B, T, W): the last block's output, before the final norm, a class token left out."""


class TextTower(nn.Module):
    """Learned token and position embeddings, pre-norm blocks with GELU, a final norm.

    pooled: `last`, the feature of each row's last token under causal attention; `mean`, the mean over tokens under full
    attention; `class`, that of a learned token behind each row under causal attention, without a position.
    """

    def __init__(self, vocabulary_size: int, config: PairsConfig, *, pooling: str) -> None:
        super().__init__()
        self.pooling, self.context_length = pooling, config.context_length
        width = config.text_width
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(config.context_length, width)
        self.class_token = nn.Parameter(torch.randn(width) * STD) if pooling == "class" else None
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, config.text_heads, **block_arguments(width))
            for _ in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.apply(initialise)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        """Rows padded on the right: ids (B, T), T at most the context length, and mask (B, T), 1 where a token is."""
        is_padding = attention_mask == 0  # (B, T)
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]  # (B, T, W)
        if self.class_token is not None:
            x = torch.cat([x, self.class_token.expand(len(x), 1, -1)], dim=1)  # (B, T + 1, W)
            is_padding = torch.cat([is_padding, is_padding.new_zeros(len(x), 1)], dim=1)
        is_causal = self.pooling != "mean"
        # Under causal attention no token sees the padding behind it; a class token stands behind the padding.
        hidden = None if self.pooling == "last" else is_padding
        mask = causal_mask(x.shape[1], x.device) if is_causal else None
        for block in self.blocks:
            x = block(x, src_mask=mask, src_key_padding_mask=hidden, is_causal=is_causal)
        if self.pooling == "class":
            return TextOutput(pooled=self.norm(x[:, -1]), states=x[:, :-1])
        if self.pooling == "last":
            last = attention_mask.sum(dim=1) - 1  # (B,)
            return TextOutput(pooled=self.norm(x[torch.arange(len(x), device=x.device), last]), states=x)
        weights = attention_mask.to(x.dtype)[..., None]  # (B, T, 1)
        return TextOutput(pooled=(self.norm(x) * weights).sum(dim=1) / weights.sum(dim=1), states=x)


def block_arguments(width: int) -> dict[str, Any]:
    """What our text blocks ask of torch's transformer layers."""
    return {
        "dim_feedforward": 4 * width,
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(length, length) bool, true where a position must not look: at those behind it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def initialise(module: nn.Module) -> None:
    """Normal weights, zero biases, norms of one; for `nn.Module.apply`.

    Embeddings have a deviation of 0.02 and matrices that of 1/√inputs, so that attention outweighs at the start what
    all captions have in common, their last token and its place.
    """
    matrices: list[Tensor | None] = []
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=STD)
    elif isinstance(module, nn.Linear):
        matrices = [module.weight]
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        matrices = [module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        if module.in_proj_bias is not None:
            nn.init.zeros_(module.in_proj_bias)
    for matrix in matrices:
        if matrix is not None:
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
