"""SigLIP (arXiv 2303.15343): of every image and every caption, whether they belong together. A baseline."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from unclipped.objectives.base import OBJECTIVES, Counts
from unclipped.objectives.dual_encoder import DualEncoder
from unclipped.objectives.pair_losses import SIGMOID_BIAS, SIGMOID_LOG_SCALE, sigmoid_loss
from unclipped.objectives.pairs import PairObjective
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.trunk import Trunk


@OBJECTIVES.register("sigmoid")
class SigmoidObjective(PairObjective):
    """The pairwise sigmoid loss over the pairs of a micro-batch, those of all processes together."""

    declared: ClassVar[Literal["contrastive", "sigmoid", "captioning"]] = "sigmoid"
    model: DualEncoder

    def __init__(self, model: DualEncoder, *, chunk: int | None = None) -> None:
        """`model` has a bias. `chunk`: rows of the similarity matrix at a time, see `pair_losses`."""
        super().__init__()
        self.model, self.chunk = model, chunk

    @classmethod
    def build(cls, trunk: Trunk, tokenizer: Any, config: PairsConfig) -> Self:
        model = DualEncoder(trunk, len(tokenizer), config, log_scale=SIGMOID_LOG_SCALE, bias=SIGMOID_BIAS)
        return cls(model, chunk=config.chunk)

    def forward(
        self,
        *,
        counts: Counts | None = None,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        **unused: Any,
    ) -> dict[str, Any]:
        model = self.model
        assert model.bias is not None
        images, texts = model.embed_images(pixel_values), model.embed_text(input_ids, attention_mask)
        loss = sigmoid_loss(images, texts, model.log_scale, model.bias, chunk=self.chunk)
        return {"loss": loss, "parts": {"sigmoid": loss.detach()}}
