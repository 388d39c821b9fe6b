"""Adapters for the vision transformers of the transformers library. One class a family, a few lines each."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unclipped.core.errors import UsageError
from unclipped.encoders.base import ENCODERS, HALF, VisionEncoder, pair
from unclipped.encoders.chosen import run_chosen
from unclipped.encoders.grouping import Grid
from unclipped.encoders.spec import Objective
from unclipped.encoders.stem import to_planes
from unclipped.encoders.vit_mae_init import ViTMAEModel

CLASSIFIER = (r"^classifier\.",)
POOLER = (r"(^|\.)pooler\.",)
TEXT_TOWER = (r"^text_model\.", r"^logit_scale$", r"^logit_bias$")


class PlaneEncoder(VisionEncoder):
    """Models that take planes (B, C, H, W): the packed patches are put back into planes by one reshape."""

    run_arguments: ClassVar[dict[str, Any]] = {}
    # Parameters that feature extraction does not use or must not train. They stay in the state dict, as buffers: an
    # optimiser or a distributed wrapper would otherwise wait for gradients that never come.
    untrained: ClassVar[tuple[str, ...]] = ()
    has_position_table: ClassVar[bool] = True

    @classmethod
    def adapt_config(cls, config: Any) -> None:
        check_shapes(config, cls.has_position_table)

    @classmethod
    def prepare(cls, model: PreTrainedModel) -> PreTrainedModel:
        for name in cls.untrained:
            keep_as_buffer(model, name)
        return model

    def run(self, patches: Tensor, grids: list[Grid], output_hidden_states: bool) -> Any:
        planes = to_planes(patches, grids[0], self.spec.patch_size, self.spec.channels)  # (B, C, H, W)
        return self.model(
            planes,
            output_hidden_states=output_hidden_states,
            **self.run_arguments,
            **self.more_arguments(patches),
            **self.attention_arguments(grids),
        )

    def more_arguments(self, patches: Tensor) -> dict[str, Any]:
        return {}


def keep_as_buffer(model: nn.Module, name: str) -> None:
    """Turn the parameter `name` of `model` into a persistent buffer of the same name; absent ones stay absent."""
    *path, leaf = name.split(".")
    owner = model.get_submodule(".".join(path))
    value = owner._parameters.pop(leaf, None)
    if value is not None:
        owner.register_buffer(leaf, value.detach())


def check_shapes(config: Any, has_position_table: bool) -> None:
    """Raise UsageError for shapes that the models' own interpolation of positions does not handle."""
    height, width = pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    if patch_height != patch_width:
        raise UsageError(
            f"{config.model_type}: expected square patches, found {patch_height}×{patch_width} pixels; "
            "an encoder made of a language model (llm:) takes rectangular ones"
        )
    if has_position_table and height // patch_height != width // patch_width:
        raise UsageError(
            f"{config.model_type}: expected a square image_size for its position table, found {height}×{width} pixels; "
            "images of other shapes are interpolated at run time"
        )


@ENCODERS.register("dinov2")
class Dinov2Encoder(PlaneEncoder):
    """DINOv2 (arXiv 2304.07193) and Web-SSL. Positions: bicubic, by the model."""

    family: ClassVar[str] = "dinov2"
    objective: ClassVar[Objective] = "self_supervised"
    untrained: ClassVar[tuple[str, ...]] = ("embeddings.mask_token",)
    dropped: ClassVar[tuple[str, ...]] = CLASSIFIER

    @classmethod
    def num_prefix_tokens(cls, config: Any) -> int:
        return 1

    def run_chosen(self, patches: Tensor, keep: Tensor, grid: Grid) -> Tensor:
        return run_chosen(self.model, patches, keep, grid)


@ENCODERS.register("dinov2_with_registers")
class Dinov2WithRegistersEncoder(Dinov2Encoder):
    """DINOv2 with register tokens (arXiv 2309.16588)."""

    family: ClassVar[str] = "dinov2_with_registers"

    @classmethod
    def num_prefix_tokens(cls, config: Any) -> int:
        return 1 + int(config.num_register_tokens)


@ENCODERS.register("dinov3_vit")
class Dinov3Encoder(PlaneEncoder):
    """DINOv3 (arXiv 2508.10104). Rotary positions on coordinates scaled to the image, so any grid fits.

    In training mode the model itself rescales those coordinates at random when its configuration says so.
    """

    family: ClassVar[str] = "dinov3_vit"
    objective: ClassVar[Objective] = "self_supervised"
    has_position_table: ClassVar[bool] = False
    untrained: ClassVar[tuple[str, ...]] = ("embeddings.mask_token",)
    dropped: ClassVar[tuple[str, ...]] = CLASSIFIER

    @classmethod
    def num_prefix_tokens(cls, config: Any) -> int:
        return 1 + int(config.num_register_tokens)


@ENCODERS.register("vit")
class ViTEncoder(PlaneEncoder):
    """The supervised vision transformer (arXiv 2010.11929). Positions: bicubic, by the model."""

    family: ClassVar[str] = "vit"
    objective: ClassVar[Objective] = "supervised"
    default_mean, default_std = HALF, HALF
    build_arguments: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    run_arguments: ClassVar[dict[str, Any]] = {"interpolate_pos_encoding": True}
    untrained: ClassVar[tuple[str, ...]] = ("embeddings.mask_token",)
    # The decoder is that of masked image modelling.
    dropped: ClassVar[tuple[str, ...]] = (*CLASSIFIER, *POOLER, r"^decoder\.", r"mask_token$")

    @classmethod
    def num_prefix_tokens(cls, config: Any) -> int:
        return 1

    def run_chosen(self, patches: Tensor, keep: Tensor, grid: Grid) -> Tensor:
        return run_chosen(self.model, patches, keep, grid)


@ENCODERS.register("vit_mae")
class ViTMAEEncoder(PlaneEncoder):
    """The encoder of a masked autoencoder (arXiv 2111.06377), which sees all patches, in order."""

    family: ClassVar[str] = "vit_mae"
    objective: ClassVar[Objective] = "self_supervised"
    run_arguments: ClassVar[dict[str, Any]] = {"interpolate_pos_encoding": True}
    # Fixed sine–cosine positions: nothing to train.
    untrained: ClassVar[tuple[str, ...]] = ("embeddings.position_embeddings",)
    dropped: ClassVar[tuple[str, ...]] = (*CLASSIFIER, r"^decoder\.")

    @classmethod
    def adapt_config(cls, config: Any) -> None:
        super().adapt_config(config)
        config.mask_ratio = 0.0

    @classmethod
    def build_model(cls, config: Any) -> PreTrainedModel:
        return ViTMAEModel._from_config(config, dtype=torch.get_default_dtype())

    @classmethod
    def num_prefix_tokens(cls, config: Any) -> int:
        return 1

    def run_chosen(self, patches: Tensor, keep: Tensor, grid: Grid) -> Tensor:
        return run_chosen(self.model, patches, keep, grid)

    def more_arguments(self, patches: Tensor) -> dict[str, Any]:
        # The model orders patches by this noise even when it masks none: rising noise keeps them where they are.
        batch, count, _ = patches.shape
        return {"noise": torch.arange(count, device=patches.device).expand(batch, -1)}


@ENCODERS.register("ijepa")
class IJepaEncoder(PlaneEncoder):
    """I-JEPA (arXiv 2301.08243): no prefix tokens. Positions: bicubic, by the model."""

    family: ClassVar[str] = "ijepa"
    objective: ClassVar[Objective] = "self_supervised"
    build_arguments: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    run_arguments: ClassVar[dict[str, Any]] = {"interpolate_pos_encoding": True}
    untrained: ClassVar[tuple[str, ...]] = ("embeddings.mask_token",)
    dropped: ClassVar[tuple[str, ...]] = (*CLASSIFIER, *POOLER, r"mask_token$")


@ENCODERS.register("siglip_vision_model")
class SiglipEncoder(PlaneEncoder):
    """SigLIP (arXiv 2303.15343), a baseline: no prefix tokens, the attention-pooling head left out."""

    family: ClassVar[str] = "siglip_vision_model"
    takes_patterns: ClassVar[bool] = False
    objective: ClassVar[Objective] = "sigmoid"
    default_mean, default_std = HALF, HALF
    run_arguments: ClassVar[dict[str, Any]] = {"interpolate_pos_encoding": True}
    dropped: ClassVar[tuple[str, ...]] = (*CLASSIFIER, *TEXT_TOWER, r"^(vision_model\.)?head\.")

    @classmethod
    def adapt_config(cls, config: Any) -> None:
        super().adapt_config(config)
        config.vision_use_head = False


@ENCODERS.register("siglip2_vision_model")
class Siglip2Encoder(VisionEncoder):
    """SigLIP 2 NaFlex (arXiv 2502.14786), a baseline at native resolution.

    The model takes packed patches itself, with the values of a patch in the order row, column, channel, and resizes
    its position table to each image (bilinear, antialiased).
    """

    family: ClassVar[str] = "siglip2_vision_model"
    takes_patterns: ClassVar[bool] = False
    objective: ClassVar[Objective] = "sigmoid"
    default_mean, default_std = HALF, HALF
    dropped: ClassVar[tuple[str, ...]] = SiglipEncoder.dropped

    @classmethod
    def adapt_config(cls, config: Any) -> None:
        config.vision_use_head = False

    @classmethod
    def native_image_size(cls, config: Any) -> None:
        return None

    def group_key(self, grid: Grid) -> Hashable:
        return grid[0] * grid[1]

    def run(self, patches: Tensor, grids: list[Grid], output_hidden_states: bool) -> Any:
        batch, count, _ = patches.shape
        height, width = self.spec.patch_size
        values = patches.view(batch, count, self.spec.channels, height, width).permute(0, 1, 3, 4, 2)
        return self.model(
            values.flatten(2),  # (B, n, ph·pw·C)
            pixel_attention_mask=None,
            spatial_shapes=torch.tensor(grids, device=patches.device),
            output_hidden_states=output_hidden_states,
        )


@ENCODERS.register("clip_vision_model")
class ClipEncoder(PlaneEncoder):
    """CLIP (arXiv 2103.00020), a baseline. Its final norm belongs to the pooled class token: patches have none."""

    family: ClassVar[str] = "clip_vision_model"
    objective: ClassVar[Objective] = "contrastive"
    default_mean, default_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    run_arguments: ClassVar[dict[str, Any]] = {"interpolate_pos_encoding": True}
    untrained: ClassVar[tuple[str, ...]] = ("post_layernorm.weight", "post_layernorm.bias")
    dropped: ClassVar[tuple[str, ...]] = (*CLASSIFIER, *TEXT_TOWER, r"^visual_projection\.", r"^text_projection\.")

    @classmethod
    def num_prefix_tokens(cls, config: Any) -> int:
        return 1
