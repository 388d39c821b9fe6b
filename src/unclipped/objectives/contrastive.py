"""CLIP (arXiv 2103.00020): an image and its caption find each other among all pairs of the batch. A baseline."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from unclipped.objectives.base import OBJECTIVES, Counts
from unclipped.objectives.dual_encoder import DualEncoder
from unclipped.objectives.pair_losses import INFO_NCE_LOG_SCALE, clamp_log_scale, info_nce
from unclipped.objectives.pairs import PairObjective
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.trunk import Trunk


@OBJECTIVES.register("contrastive")
class ContrastiveObjective(PairObjective):
    """Symmetric InfoNCE over the pairs of a micro-batch, those of all processes together."""

    declared: ClassVar[Literal["contrastive", "sigmoid", "captioning"]] = "contrastive"
    model: DualEncoder

    def __init__(self, model: DualEncoder, *, chunk: int | None = None) -> None:
        """`chunk`: rows of the similarity matrix at a time, see `pair_losses`."""
        super().__init__()
        self.model, self.chunk = model, chunk

    @classmethod
    def build(cls, trunk: Trunk, tokenizer: Any, config: PairsConfig) -> Self:
        return cls(DualEncoder(trunk, len(tokenizer), config, log_scale=INFO_NCE_LOG_SCALE), chunk=config.chunk)

    def forward(
        self,
        *,
        counts: Counts | None = None,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        **unused: Any,
    ) -> dict[str, Any]:
        images = self.model.embed_images(pixel_values)
        texts = self.model.embed_text(input_ids, attention_mask)
        loss = info_nce(images, texts, self.model.log_scale, chunk=self.chunk)
        return {"loss": loss, "parts": {"contrastive": loss.detach()}}

    def after_step(self) -> None:
        """The factor on cosines stays at 100 or less."""
        clamp_log_scale(self.model.log_scale)
