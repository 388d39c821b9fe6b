"""CoCa (arXiv 2205.01917): one decoder that both compares captions with images and writes them. A baseline.

The lower half of the decoder reads text alone; a class token behind the caption gives the feature that is compared.
The upper half attends to image tokens and predicts the next word. Two attention poolings of the patches give the one
feature that is compared and the image tokens that are read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from unclipped.objectives.base import OBJECTIVES, Batch, Counts, normaliser
from unclipped.objectives.caption_decoder import CaptionDecoder, moved_on, summed_cross_entropy
from unclipped.objectives.pair_losses import INFO_NCE_LOG_SCALE, clamp_log_scale, info_nce, unit
from unclipped.objectives.pairs import PairModel, PairObjective
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.text_tower import STD, TextTower, causal_mask, initialise
from unclipped.objectives.trunk import Trunk


class AttentionPool(nn.Module):
    """Learned queries attend to patches: (B, n, features) → (B, queries, width), normalised."""

    def __init__(self, features: int, width: int, *, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * STD)
        self.norm = nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(width, heads, kdim=features, vdim=features, batch_first=True)
        self.final_norm = nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        seen = self.norm(patches)
        queries = self.queries.expand(len(patches), -1, -1)  # (B, queries, width)
        return self.final_norm(self.attention(queries, seen, seen, need_weights=False)[0])


class CoCa(PairModel):
    """A trunk, its two poolings, and the two halves of the text decoder."""

    def __init__(self, trunk: Trunk, vocabulary_size: int, config: PairsConfig, *, start: int) -> None:
        """`start`: the token before a caption's first."""
        super().__init__()
        width, heads = config.text_width, config.text_heads
        self.trunk, self.start, self.bias = trunk, start, None
        self.image_pool = AttentionPool(trunk.width, width, queries=1, heads=heads)
        self.token_pool = AttentionPool(trunk.width, width, queries=config.caption_queries, heads=heads)
        self.text = TextTower(vocabulary_size, config, pooling="class")
        self.decoder = CaptionDecoder(vocabulary_size, width=width, heads=heads, layers=config.decoder_layers)
        self.image_projection = nn.Linear(width, config.embedding_size, bias=False)
        self.text_projection = nn.Linear(width, config.embedding_size, bias=False)
        for name, module in self.named_children():
            if name != "trunk":
                module.apply(initialise)
        self.log_scale = nn.Parameter(torch.tensor([INFO_NCE_LOG_SCALE]))

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self._image_feature(self.trunk(pixels).patches)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._text(input_ids, attention_mask)[0]

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images and texts (B, embedding size) and, for each token of the rows, scores (B, T, V) from the
        image and the tokens before it."""
        patches = self.trunk(pixels).patches  # (B, n, features)
        texts, x = self._text(input_ids, attention_mask)
        scores = self.decoder(x, self.token_pool(patches), mask=causal_mask(x.shape[1], x.device), is_causal=True)
        return self._image_feature(patches), texts, scores

    def _image_feature(self, patches: Tensor) -> Tensor:
        return unit(self.image_projection(self.image_pool(patches)[:, 0]))

    def _text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, embedding size) and the lower half's states (B, T, width) of rows moved on by the start token,
        so that the state at a place has not seen the token of that place."""
        output = self.text(moved_on(input_ids, self.start), attention_mask)
        return unit(self.text_projection(output.pooled)), output.states


@OBJECTIVES.register("coca")
class CoCaObjective(PairObjective):
    """Weighted sum of symmetric InfoNCE and of the cross-entropy of the captions' tokens, mean over tokens."""

    declared: ClassVar[Literal["contrastive", "sigmoid", "captioning"]] = "contrastive"
    reads_patches = True
    model: CoCa

    def __init__(self, model: CoCa, config: PairsConfig) -> None:
        super().__init__()
        self.model, self.options = model, config

    @classmethod
    def build(cls, trunk: Trunk, tokenizer: Any, config: PairsConfig) -> Self:
        return cls(CoCa(trunk, len(tokenizer), config, start=int(tokenizer.eos_token_id)), config)

    def count(self, batch: Batch) -> Counts:
        mask = batch["attention_mask"]
        return {"pairs": torch.tensor(len(mask), device=mask.device), "tokens": mask.sum()}

    def forward(
        self,
        *,
        counts: Counts | None = None,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        **unused: Any,
    ) -> dict[str, Any]:
        own = self.count({"attention_mask": attention_mask})
        images, texts, scores = self.model(pixel_values, input_ids, attention_mask)
        caption = summed_cross_entropy(scores, input_ids, attention_mask) / normaliser(counts, own, "tokens")
        contrastive = info_nce(images, texts, self.model.log_scale, chunk=self.options.chunk)
        contrastive = contrastive * (own["pairs"] / normaliser(counts, own, "pairs"))
        loss = self.options.contrastive_weight * contrastive + self.options.caption_weight * caption
        return {"loss": loss, "parts": {"contrastive": contrastive.detach(), "caption": caption.detach()}}

    def after_step(self) -> None:
        """The factor on cosines stays at 100 or less."""
        clamp_log_scale(self.model.log_scale)
