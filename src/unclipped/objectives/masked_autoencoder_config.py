"""Configuration of masked autoencoding. Imports no torch."""

from __future__ import annotations

from unclipped.core.config import Decay, FrozenConfig, Heads, Layers, Width


class MaskedAutoencoderConfig(FrozenConfig):
    """Filling in hidden patches (arXiv 2111.06377): what is hidden, and the light decoder that fills it in."""

    mask_ratio: Decay = 0.75
    """Share of the patches that the encoder does not see; 0: it sees all and the decoder predicts all."""
    normalise_pixels: bool = True
    """Predict the pixels of a patch less their mean, divided by their standard deviation."""
    decoder_width: Width | None = None
    """Width of the decoder, a multiple of four and of `decoder_heads`; null: half the encoder's."""
    decoder_blocks: Layers = 2
    """Transformer blocks of the decoder."""
    decoder_heads: Heads = 4
    """Attention heads of the decoder."""
    decoder_hidden: Width | None = None
    """Width inside the decoder's feed-forward layers; null: four times its width."""
