"""What objectives on image-text pairs share: a model that embeds both sides, and how a batch of pairs is counted."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from unclipped.objectives.base import Batch, Objective
from unclipped.objectives.health import feature_health
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.trunk import Trunk


class PairModel(nn.Module):
    """A trunk and a text side that meet in one space."""

    trunk: Trunk
    log_scale: nn.Parameter
    """(1,): logarithm of the factor on cosines. Not a scalar, which FSDP2 cannot shard."""
    bias: nn.Parameter | None
    """(1,): added to scaled cosines, where the loss has one."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W), normalised → (B, embedding size), unit length."""
        raise NotImplementedError(f"{type(self).__name__} embeds no images")

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rows of `CaptionTokens` (B, T) → (B, embedding size), unit length."""
        raise NotImplementedError(f"{type(self).__name__} embeds no text")


class PairObjective(Objective):
    """An objective on batches of `pixel_values` (B, C, H, W), `input_ids` and `attention_mask` (B, T)."""

    needs = "pairs"
    declared: ClassVar[Literal["contrastive", "sigmoid", "captioning"]]
    """How an encoder trained by it is declared when it is saved."""
    reads_patches: ClassVar[bool] = False
    """Whether the loss reads the patches alone and leaves a class token's last state untrained."""

    @classmethod
    def build(cls, trunk: Trunk, tokenizer: Any, config: PairsConfig) -> Self:
        """The objective around a fresh text side for `trunk`; `tokenizer` has an end-of-text token."""
        raise NotImplementedError(f"{cls.__name__} does not build its text side")

    def part_of(self, name: str) -> Literal["vision", "connector", "text"]:
        """The text side is thrown away with the objective's heads, so all is trained as one part."""
        return "vision"

    def num_samples(self, batch: Batch) -> int:
        return batch["pixel_values"].shape[0]

    def num_tokens(self, batch: Batch) -> int:
        """Patches and tokens of text."""
        trunk: Any = self.model.trunk
        images, _, height, width = batch["pixel_values"].shape
        patches = (height // trunk.patch_size[0]) * (width // trunk.patch_size[1])
        return images * patches + int(batch["attention_mask"].sum())

    def health(self, batch: Batch) -> dict[str, float]:
        """Rank and spread of the images' features: the pooled one, or the mean patch where the loss reads patches."""
        output = self.model.trunk(batch["pixel_values"])
        return feature_health(output.patches.mean(dim=1) if self.reads_patches else output.pooled)
