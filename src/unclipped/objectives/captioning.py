"""Captioning, in part by parallel prediction: an encoder learns what a decoder needs to write the caption.

CapPa (arXiv 2306.07915). No caption is compared with another one's image, so the encoder is no baseline and batches
may be small. Predicting all tokens at once, from the image alone, keeps the decoder from guessing words by words.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unclipped.core.errors import UsageError
from unclipped.objectives.base import OBJECTIVES, Batch, Counts, normaliser
from unclipped.objectives.caption_decoder import CaptionDecoder, moved_on, summed_cross_entropy
from unclipped.objectives.captioning_config import CaptioningConfig
from unclipped.objectives.pairs import PairObjective
from unclipped.objectives.text_tower import STD, causal_mask, initialise
from unclipped.objectives.trunk import Trunk


class Captioner(nn.Module):
    """A trunk and a decoder that attends to its patches."""

    def __init__(
        self, trunk: Trunk, vocabulary_size: int, config: CaptioningConfig, *, context_length: int, start: int
    ) -> None:
        """context_length: longest caption in tokens. start: the token before a caption's first."""
        super().__init__()
        self.trunk, self.start, self.heads, self.context_length = trunk, start, config.heads, context_length
        self.tokens = nn.Embedding(vocabulary_size, config.width)
        self.positions = nn.Embedding(context_length, config.width)
        self.mask_token = nn.Parameter(torch.randn(config.width) * STD)
        self.image_projection = nn.Linear(trunk.width, config.width, bias=config.bias)
        self.decoder = CaptionDecoder(
            vocabulary_size, width=config.width, heads=config.heads, layers=config.layers, bias=config.bias
        )
        for name, module in self.named_children():
            if name != "trunk":
                module.apply(initialise)
        nn.init.zeros_(self.decoder.head.weight)  # every token is equally likely at the start

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, parallel: Tensor) -> Tensor:
        """Scores (B, T, V) of each place's token.

        pixels: (B, C, H, W). input_ids, attention_mask: (B, T), rows padded on the right. parallel: (B,) bool, these
        rows are predicted from the image alone.
        """
        return self.decode(self.trunk(pixels).patches, input_ids, attention_mask, parallel)

    def decode(self, patches: Tensor, input_ids: Tensor, attention_mask: Tensor, parallel: Tensor) -> Tensor:
        """Scores (B, T, V) as `forward`, from patch features (B, n, trunk's width).

        Raises UsageError for rows longer than the context.
        """
        length = input_ids.shape[1]
        if length > self.context_length:
            raise UsageError(
                f"captioning: a caption of {length} tokens, the decoder's longest is {self.context_length}; raise "
                "pairs.context_length"
            )
        inputs = self.tokens(moved_on(input_ids, self.start))  # (B, T, W)
        # Both kinds enter every batch, so that all parameters have a gradient on every process.
        inputs = torch.where(parallel[:, None, None], self.mask_token.to(inputs.dtype), inputs)
        x = inputs + self.positions.weight[:length]
        mask = hidden_places(attention_mask, parallel).repeat_interleave(self.heads, dim=0)  # (B·heads, T, T)
        return self.decoder(x, self.image_projection(patches), mask=mask)


def hidden_places(attention_mask: Tensor, parallel: Tensor) -> Tensor:
    """(B, T, T) bool, true where a place (row) must not look: padding, and in rows that are not parallel what is
    behind the place. The inputs are moved on, so a place may look at itself.
    """
    is_padding = attention_mask[:, None, :] == 0  # (B, 1, T)
    later = causal_mask(attention_mask.shape[1], attention_mask.device)  # (T, T)
    return is_padding | (later & ~parallel[:, None, None])


@OBJECTIVES.register("captioning")
class CaptioningObjective(PairObjective):
    """Cross-entropy of the captions' tokens, mean over the tokens of the whole batch without padding.

    Batches also have `parallel`, (B,) bool: the captions that are predicted all at once.
    """

    declared: ClassVar[Literal["contrastive", "sigmoid", "captioning"]] = "captioning"
    reads_patches = True
    model: Captioner

    def __init__(self, model: Captioner) -> None:
        super().__init__()
        self.model = model

    def count(self, batch: Batch) -> Counts:
        return {"tokens": batch["attention_mask"].sum()}

    def forward(
        self,
        *,
        counts: Counts | None = None,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        parallel: Tensor,
        **unused: Any,
    ) -> dict[str, Any]:
        scores = self.model(pixel_values, input_ids, attention_mask, parallel)  # (B, T, V)
        own = self.count({"attention_mask": attention_mask})
        loss = summed_cross_entropy(scores, input_ids, attention_mask) / normaliser(counts, own, "tokens")
        return {"loss": loss, "parts": {"caption": loss.detach()}}
