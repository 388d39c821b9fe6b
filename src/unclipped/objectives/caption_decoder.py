"""What the objectives that write captions share: blocks that attend to an image, a head over words, and the loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from unclipped.objectives.ctc import IGNORED
from unclipped.objectives.dino_losses import wide
from unclipped.objectives.text_tower import block_arguments


class CaptionDecoder(nn.Module):
    """Pre-norm blocks of self-attention, attention to the image and GELU; a final norm; a head over the vocabulary."""

    def __init__(self, vocabulary_size: int, *, width: int, heads: int, layers: int, bias: bool = True) -> None:
        """`bias`: whether blocks and norms have biases; the head has none."""
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, bias=bias, **block_arguments(width)) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocabulary_size, bias=False)

    def forward(self, x: Tensor, image: Tensor, *, mask: Tensor, is_causal: bool = False) -> Tensor:
        """Scores (B, T, V) of each place's token.

        x: (B, T, W) embedded text. image: (B, n, W). mask: bool, true where a place must not look, (T, T) or, one for
        each row and head, (B·heads, T, T). is_causal: says that `mask` is the causal one.
        """
        for block in self.blocks:
            x = block(x, image, tgt_mask=mask, tgt_is_causal=is_causal)  # (B, T, W)
        return self.head(self.norm(x))


def moved_on(input_ids: Tensor, start: int) -> Tensor:
    """Ids (B, T) one place to the right behind `start`, so that no place is given the token that it predicts."""
    return F.pad(input_ids[:, :-1], (1, 0), value=start)


def summed_cross_entropy(scores: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """−Σ log probability of the rows' tokens, padding left out. scores: (B, T, V); ids and mask: (B, T)."""
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    return F.cross_entropy(wide(scores.flatten(0, 1)), labels.flatten(), ignore_index=IGNORED, reduction="sum")
