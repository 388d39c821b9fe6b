"""The light decoder of a masked autoencoder (arXiv 2111.06377): from visible features to the pixels of hidden patches.

Attention does not know the order of its tokens, only the positions that were added to them. So tokens stay in the order
prefix, visible, hidden: nothing is put back into rows and columns, the last block asks only for the hidden ones, and
only their pixels are predicted. The result is that of decoding everything in image order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclipped.core.errors import UsageError
from unclipped.encoders.vit_mae_init import TOKEN_STD, sine_cosine_table


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each after a layer norm and around a residual."""

    def __init__(self, width: int, *, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """(B, t, d) → (B, t − first, d): tokens from number `first` on, which still attend to all."""
        width = tokens.shape[2]
        normed = self.norm1(tokens)
        if first:
            parts = self.qkv.weight.split((width, 2 * width)), self.qkv.bias.split((width, 2 * width))
            query = F.linear(normed[:, first:], parts[0][0], parts[1][0])  # (B, t − first, d)
            key, value = F.linear(normed, parts[0][1], parts[1][1]).chunk(2, dim=-1)  # (B, t, d) each
        else:
            query, key, value = self.qkv(normed).chunk(3, dim=-1)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # (B, t − first, d)
        tokens = tokens[:, first:] + self.out(seen)
        return tokens + self.down(F.gelu(self.up(self.norm2(tokens))))


class PixelDecoder(nn.Module):
    """Features of visible patches, a shared mask token for hidden ones, and fixed sine–cosine positions."""

    def __init__(
        self, encoder_width: int, patch_values: int, *, width: int, blocks: int, heads: int, hidden: int, eps: float
    ) -> None:
        """`patch_values`: pixels of a patch times channels. Raises UsageError for a width that heads do not divide."""
        super().__init__()
        if width % heads or width % 4:
            raise UsageError(
                f"masked_autoencoder: the decoder's width {width} is no multiple of four and of its {heads} heads; "
                "choose another decoder_width or decoder_heads"
            )
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * TOKEN_STD)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads=heads, hidden=hidden, eps=eps) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.predict = nn.Linear(width, patch_values)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self._tables: dict[tuple[int, int], Tensor] = {}

    def forward(self, prefix: Tensor, visible: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels (B, h, patch_values) of the hidden patches; of all n when none is hidden.

        prefix (B, p, D), visible (B, k, D); order (B, n): places of the visible patches, then those of the h = n − k
        hidden ones, row-major in a grid of (rows, columns).
        """
        shown, prefixes = visible.shape[1], prefix.shape[1]
        positions = self._positions(grid, order.device)[order]  # (B, n, d)
        tokens = self.embed(torch.cat((prefix, visible), dim=1))  # (B, p + k, d); prefix tokens have no position
        parts = [tokens[:, :prefixes], tokens[:, prefixes:] + positions[:, :shown].to(tokens.dtype)]
        if shown < order.shape[1]:
            parts.append(self.mask_token.to(tokens.dtype) + positions[:, shown:].to(tokens.dtype))
        tokens = torch.cat(parts, dim=1)  # (B, p + n, d)
        wanted = prefixes + (shown if shown < order.shape[1] else 0)
        *earlier, last = self.blocks
        for block in earlier:
            tokens = block(tokens)
        return self.predict(self.norm(last(tokens, first=wanted)))

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(n, d) in float32, made once for each grid."""
        table = self._tables.get(grid)
        if table is None or table.device != device:
            table = self._tables[grid] = sine_cosine_table(*grid, self.width).to(device)
        return table
