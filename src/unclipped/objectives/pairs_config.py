"""Configuration of pretraining on image-text pairs. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unclipped.core.config import Count, FrozenConfig, Heads, Layers, LossWeight, Tokens, Width


class PairsConfig(FrozenConfig):
    """The text side of the objectives that compare images with captions (CLIP, SigLIP, CoCa): measured baselines."""

    embedding_size: Width = 256
    """Width of the space in which images and captions are compared."""
    context_length: Tokens = 64
    """Longest caption in tokens, its end-of-text token included."""
    long_captions: Literal["refuse", "cut"] = "refuse"
    """A caption longer than `context_length`: an error that names the sample, or cut before its end-of-text token."""
    text_width: Width = 128
    """Width of the text tower's blocks."""
    text_layers: Layers = 4
    """Blocks of the text tower (coca: of the unimodal half of its decoder)."""
    text_heads: Heads = 4
    """Attention heads of each text block."""
    text_pooling: Literal["last", "mean"] = "last"
    """contrastive, sigmoid: the caption's feature. `last`: that of the end-of-text token under causal attention.
    `mean`: the mean over all tokens under full attention. coca always uses a class token behind the caption."""
    chunk: Count | None = None
    """Rows of the similarity matrix computed at a time, and again in the backward pass, so that memory grows with the
    batch and not with its square; null: all at once."""
    decoder_layers: Layers = 4
    """coca: blocks of the multimodal half, which attends to the image."""
    caption_queries: Width = 256
    """coca: image tokens that attention pooling gives to the multimodal half."""
    contrastive_weight: LossWeight = 1.0
    """coca: weight of the contrastive loss."""
    caption_weight: Annotated[LossWeight, Field(gt=0)] = 2.0
    """coca: weight of the captioning loss."""

    @model_validator(mode="after")
    def _heads_divide(self) -> PairsConfig:
        if self.text_width % self.text_heads:
            raise ValueError(f"text_width ({self.text_width}) is no multiple of text_heads ({self.text_heads})")
        return self
