"""Masked autoencoding of images (arXiv 2111.06377) on any trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclipped.core.errors import UsageError
from unclipped.images.patches import patchify
from unclipped.objectives.base import OBJECTIVES, Batch, Counts, Objective
from unclipped.objectives.health import feature_health
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.objectives.pixel_decoder import PixelDecoder
from unclipped.objectives.trunk import Trunk, take

EPSILON = 1e-6
"""Added to the variance of a patch."""


@dataclass
class FilledIn:
    """What a masked autoencoder predicts."""

    predicted: Tensor
    """(B, h, C·ph·pw): the hidden patches, normalised where the model predicts normalised pixels."""
    hidden: Tensor
    """(B, h): their places, row-major."""


class MaskedAutoencoder(nn.Module):
    """A trunk that sees the visible patches only, and a light decoder over all positions."""

    def __init__(self, trunk: Trunk, config: MaskedAutoencoderConfig, *, eps: float = 1e-6) -> None:
        """`eps`: that of the decoder's layer norms. Raises UsageError for a decoder that its heads do not divide, and
        for an encoder whose positions are all equal: it could not know where a patch is."""
        super().__init__()
        model: Any = trunk.encoder.model
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        if table is not None and table.std().item() == 0.0:
            raise UsageError("masked_autoencoder: the encoder's position table is constant; initialise it first")
        self.trunk, self.options = trunk, config
        width = config.decoder_width or trunk.width // 2
        self.decoder = PixelDecoder(
            trunk.width,
            trunk.encoder.spec.patch_values,
            width=width,
            blocks=config.decoder_blocks,
            heads=config.decoder_heads,
            hidden=config.decoder_hidden or 4 * width,
            eps=eps,
        )

    def visible(self, patches: int) -> int:
        """Patches that the encoder sees of so many. Raises UsageError when there is none."""
        shown = int(patches * (1 - self.options.mask_ratio))
        if not shown:
            raise UsageError(
                f"masked_autoencoder: mask_ratio {self.options.mask_ratio} leaves none of {patches} patches visible; "
                "lower it or take smaller patches"
            )
        return shown

    def forward(self, pixels: Tensor, noise: Tensor) -> FilledIn:
        """pixels (B, C, H, W), normalised; noise (B, n): the patches with the smallest values stay visible."""
        order = noise.argsort(dim=1)  # (B, n)
        shown, (ph, pw) = self.visible(noise.shape[1]), self.trunk.patch_size
        seen = self.trunk(pixels, keep=order[:, :shown])
        grid = pixels.shape[2] // ph, pixels.shape[3] // pw
        predicted = self.decoder(seen.prefix, seen.patches, order, grid)
        return FilledIn(predicted=predicted, hidden=order[:, shown:] if shown < noise.shape[1] else order)

    def targets(self, pixels: Tensor, places: Tensor) -> Tensor:
        """What is to be predicted at places (B, h): (B, h, C·ph·pw), at least float32."""
        patches = take(patchify(pixels, self.trunk.patch_size), places)
        patches = patches if patches.dtype == torch.float64 else patches.float()
        if not self.options.normalise_pixels:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased
        return (patches - mean) * (variance + EPSILON).rsqrt()


@OBJECTIVES.register("masked_autoencoder")
class MaskedAutoencoderObjective(Objective):
    """Mean squared error on the hidden patches; every image has equally many, so a mean of means is the mean."""

    needs = "images"
    model: MaskedAutoencoder

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def part_of(self, name: str) -> Literal["vision", "connector", "text"]:
        return "vision"

    def num_samples(self, batch: Batch) -> int:
        return batch["pixel_values"].shape[0]

    def num_tokens(self, batch: Batch) -> int:
        """Patches that the encoder sees."""
        images, patches = batch["noise"].shape
        return images * self.model.visible(patches)

    def forward(
        self, *, counts: Counts | None = None, pixel_values: Tensor, noise: Tensor, **unused: Any
    ) -> dict[str, Any]:
        """`pixel_values`: (batch, channels, side, side), normalised. `noise`: (batch, patches), the smallest stay."""
        filled = self.model(pixel_values, noise)
        targets = self.model.targets(pixel_values, filled.hidden)
        loss = F.mse_loss(filled.predicted.to(targets.dtype), targets)
        return {"loss": loss, "parts": {"reconstruction": loss.detach()}}

    def health(self, batch: Batch) -> dict[str, float]:
        """Rank and spread of the pooled features of whole images."""
        return feature_health(self.model.trunk(batch["pixel_values"]).pooled)
