"""Configuration of an import: what the original file cannot say itself. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unclipped.core.config import FrozenConfig, Heads, Number, PathText
from unclipped.encoders.spec import Objective

_Statistics = Annotated[tuple[Annotated[Number, Field(ge=-1000, le=1000)], ...], Field(min_length=1, max_length=16)]


class ImportConfig(FrozenConfig):
    """An encoder's weights under the names of the code that trained it."""

    checkpoint: PathText
    """File with the weights: .pth, .pt or .safetensors."""
    weights: Literal["teacher", "student"] | None = None
    """Whose weights of a file that holds both; null: the teacher's."""
    dino_heads: PathText | None = None
    """File that holds the DINO and iBOT heads of this encoder alone."""
    attention_heads: Heads | None = None
    """Attention heads of the encoder; null: those that its width has in the published shapes."""
    decoder: bool = False
    """Keep the decoder of a masked autoencoder (`vit_mae`); else it is left out (`vit`)."""
    decoder_heads: Heads | None = None
    """Attention heads of that decoder; null: 16 for the width of 512, as published."""
    normalised_pixels: bool = True
    """That decoder predicts pixels normalised in each patch."""
    mean: _Statistics | None = None
    """Mean of each channel on values in 0..1; null: ImageNet's."""
    std: _Statistics | None = None
    """Standard deviation of each channel on values in 0..1; null: ImageNet's."""
    objective: Objective | None = None
    """How the weights were trained; null: self_supervised, unless the file holds a classifier."""
    leave_out: Annotated[tuple[PathText, ...], Field(max_length=10_000)] = ()
    """Tensors that are left out, by name or pattern with * and ?."""

    @model_validator(mode="after")
    def _consistent(self) -> ImportConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: give both or neither")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(f"mean has {len(self.mean)} numbers and std {len(self.std)}; give one a channel")
            if min(self.std) <= 0:
                raise ValueError(f"std must be positive; found {self.std}")
        if not self.decoder and (self.decoder_heads is not None or not self.normalised_pixels):
            raise ValueError("decoder_heads and normalised_pixels: only with decoder")
        return self
