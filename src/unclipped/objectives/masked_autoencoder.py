"""Masked autoencoding of images (arXiv 2111.06377), as transformers' ViTMAE computes it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from transformers import ViTMAEForPreTraining

from unclipped.core.errors import UsageError
from unclipped.objectives.base import OBJECTIVES, Batch, Counts, Objective


@OBJECTIVES.register("masked_autoencoder")
class MaskedAutoencoderObjective(Objective):
    """Mean squared error on the masked patches; every image has equally many, so a mean of means is the mean."""

    needs = "images"
    model: ViTMAEForPreTraining

    def __init__(self, model: ViTMAEForPreTraining) -> None:
        """Raises UsageError when the model's positions are all equal: it could not know where a patch is."""
        super().__init__()
        for name, table in (
            ("encoder", model.vit.embeddings.position_embeddings),
            ("decoder", model.decoder.decoder_pos_embed),
        ):
            if float(table.std()) == 0.0:
                raise UsageError(f"masked_autoencoder: the {name}'s position table is constant; initialise it first")
        self.model = model

    def part_of(self, name: str) -> Literal["vision", "connector", "text"]:
        return "vision"

    def num_samples(self, batch: Batch) -> int:
        return batch["pixel_values"].shape[0]

    def num_tokens(self, batch: Batch) -> int:
        """Patches that the encoder sees."""
        shown = 1.0 - self.model.config.mask_ratio
        return round(batch["noise"].numel() * shown)

    def forward(
        self, *, counts: Counts | None = None, pixel_values: Tensor, noise: Tensor, **unused: Any
    ) -> dict[str, Any]:
        """`pixel_values`: (batch, channels, side, side), normalised. `noise`: (batch, patches), the smallest stay."""
        loss = self.model(pixel_values=pixel_values, noise=noise).loss
        return {"loss": loss, "parts": {"reconstruction": loss.detach()}}
