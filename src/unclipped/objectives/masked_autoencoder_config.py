"""Configuration of masked autoencoding. Imports no torch."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from unclipped.core.config import FrozenConfig


class MaskedAutoencoderConfig(FrozenConfig):
    """Filling in hidden patches (arXiv 2111.06377): what is hidden, and the light decoder that fills it in."""

    mask_ratio: float = Field(default=0.75, ge=0.0, lt=1.0)
    """Share of the patches that the encoder does not see; 0: it sees all and the decoder predicts all."""
    normalise_pixels: bool = True
    """Predict the pixels of a patch less their mean, divided by their standard deviation."""
    decoder_width: PositiveInt | None = None
    """Width of the decoder, a multiple of four and of `decoder_heads`; null: half the encoder's."""
    decoder_blocks: PositiveInt = 2
    """Transformer blocks of the decoder."""
    decoder_heads: PositiveInt = 4
    """Attention heads of the decoder."""
    decoder_hidden: PositiveInt | None = None
    """Width inside the decoder's feed-forward layers; null: four times its width."""
