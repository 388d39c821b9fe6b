"""Configuration of pretraining by captioning. Imports no torch."""

from __future__ import annotations

from pydantic import model_validator

from unclipped.core.config import FrozenConfig, Heads, Layers, Share, Width


class CaptioningConfig(FrozenConfig):
    """The decoder that writes captions from the encoder's patches (CapPa, arXiv 2306.07915)."""

    parallel_share: Share = 0.75
    """Probability that a caption is predicted all at once from the image, without seeing any of its tokens; else each
    token is predicted from the image and the tokens before it."""
    width: Width = 128
    """Width of the decoder's blocks."""
    layers: Layers = 2
    """Blocks of the decoder, each with self-attention and attention to the patches."""
    heads: Heads = 4
    """Attention heads of each block."""
    bias: bool = False
    """Whether the blocks' matrices and norms have biases."""

    @model_validator(mode="after")
    def _heads_divide(self) -> CaptioningConfig:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is no multiple of heads ({self.heads})")
        return self
