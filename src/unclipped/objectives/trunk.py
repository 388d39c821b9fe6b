"""The encoder that an objective trains: planes in, one pooled feature and the patches' features out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclipped.core.errors import UsageError, nearest
from unclipped.core.files import whole_folder, write_json
from unclipped.encoders.base import VisionEncoder
from unclipped.encoders.build import build_encoder
from unclipped.encoders.checkpoint import quiet
from unclipped.encoders.given_config import check_fields, config_from_fields, known_config
from unclipped.encoders.hf import ViTMAEEncoder
from unclipped.encoders.llm_encoder import register_llm_encoder
from unclipped.encoders.vit_shapes import named_shape
from unclipped.images.config import ImageRule
from unclipped.images.patches import patchify

FAMILIES = ("dinov2", "dinov2_with_registers", "unclipped_llm_encoder", "vit")
TOKEN_STD = 0.02
_SMALL: dict[str, Any] = {
    "image_size": 96,
    "patch_size": 12,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_SMALL_DECODER: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


@dataclass
class TrunkOutput:
    """Features of a batch of images, after the family's final norm."""

    pooled: Tensor
    """(B, D): the class token where the family has one, else the mean of the patches."""
    patches: Tensor
    """(B, n, D), prefix tokens removed, row-major; or the chosen ones in the order they were named."""
    prefix: Tensor
    """(B, p, D): class and register tokens; p is 0 where the family has none."""


class Trunk(nn.Module):
    """A trainable encoder as objectives see it: planes in, one pooled and n patch features out.

    With `maskable`, patches can be replaced by a learned token right after the patch embedding, before positions. The
    token belongs to the trunk and is not saved with the encoder: only pretraining uses it.
    """

    mask_token: nn.Parameter | None

    def __init__(self, encoder: VisionEncoder, *, maskable: bool = False) -> None:
        """Raises UsageError for an encoder of chosen layers, or of a family whose patches cannot be masked."""
        super().__init__()
        if encoder.feature_layers is not None:
            raise UsageError("a trunk gives the last layer's features; build the encoder without feature_layers")
        model: Any = encoder.model
        self.encoder = encoder
        self.width, self.patch_size, self.channels = (
            encoder.spec.hidden_size,
            encoder.spec.patch_size,
            encoder.spec.channels,
        )
        self.mask_token = None
        if maskable:
            if isinstance(encoder, ViTMAEEncoder) or not (hasattr(model, "stem") or hasattr(model, "embeddings")):
                raise UsageError(f"{encoder.family}: its patches cannot be masked; train one of {', '.join(FAMILIES)}")
            self.mask_token = nn.Parameter(torch.randn(self.width) * TOKEN_STD)

    def forward(self, pixels: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TrunkOutput:
        """Encode images; positions are interpolated as the family does it.

        pixels: (B, C, H, W), normalised, H and W multiples of the patch. mask: (B, n) bool, these patches enter as the
        mask token. keep: (B, k) int64, only these patches enter, at their own positions. Raises UsageError for a side
        that patches do not fill, a mask on a trunk that has no mask token, a mask of another shape, a mask together
        with `keep`, or a family that cannot run on chosen patches.
        """
        height, width = pixels.shape[-2:]
        (ph, pw), batch = self.patch_size, pixels.shape[0]
        if pixels.ndim != 4 or pixels.shape[1] != self.channels or height % ph or width % pw:
            raise UsageError(
                f"trunk: expected pixels (B, {self.channels}, H, W) with sides that are multiples of {ph}×{pw} px, "
                f"found {tuple(pixels.shape)}; crop to multiples of the patch"
            )
        grid = (height // ph, width // pw)
        patches = patchify(pixels, self.patch_size)  # (B, n, C·ph·pw)
        if keep is not None:
            if mask is not None or keep.ndim != 2 or keep.shape[0] != batch:
                raise UsageError(
                    f"trunk: expected keep ({batch}, k) and no mask beside it, found keep {tuple(keep.shape)} and "
                    f"{'no' if mask is None else 'a'} mask"
                )
            states = self.encoder.run_chosen(take(patches, keep), keep, grid)  # (B, prefix + k, D)
        elif mask is None:
            states = self.encoder.run(patches, [grid] * batch, False).last_hidden_state
        else:
            if self.mask_token is None:
                raise UsageError("trunk: a mask was given, but this trunk has no mask token; build it with maskable")
            if mask.shape != patches.shape[:2]:
                raise UsageError(f"trunk: expected a mask {tuple(patches.shape[:2])}, found {tuple(mask.shape)}")
            token = self.mask_token

            def hide(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
                return torch.where(mask[..., None], token.to(embedded.dtype), embedded)  # (B, n, D)

            handle = self._embedding().register_forward_hook(hide)
            try:
                states = self.encoder.run(patches, [grid] * batch, False).last_hidden_state
            finally:
                handle.remove()
        prefix = self.encoder.spec.num_prefix_tokens
        features = states[:, prefix:]  # (B, n or k, D)
        pooled = states[:, 0] if prefix else features.mean(dim=1)
        return TrunkOutput(pooled=pooled, patches=features, prefix=states[:, :prefix])

    def _embedding(self) -> nn.Module:
        """The module whose output (B, n, D) is the patches before positions and class token."""
        model: Any = self.encoder.model
        return model.stem if hasattr(model, "stem") else model.embeddings.patch_embeddings


def take(rows: Tensor, places: Tensor) -> Tensor:
    """Of (B, n, D) the rows at places (B, k) → (B, k, D)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))


def build_trunk(shape: dict[str, Any], *, image_size: int | None, maskable: bool = False) -> Trunk:
    """A trunk with fresh weights. `shape`: `model_type` and fields of its configuration; the default is small.

    Or `name` (see `encoders/vit_shapes.py`) and fields that differ from that shape.

    image_size: side of the position table in pixels, where the family has one; it replaces `shape.image_size`.
    Raises UsageError for another model type, an unknown field, or an image side that patches do not fill.
    """
    fields = dict(shape)
    if (name := fields.pop("name", None)) is not None:
        if not isinstance(name, str):
            raise UsageError(f"shape.name: expected the name of a shape, found {name!r:.60}")
        named = named_shape(name)
        if fields.get("model_type", named["model_type"]) != named["model_type"]:
            raise UsageError(
                f"shape.model_type: the shape '{name}' is a {named['model_type']}, found {fields['model_type']}; "
                "leave one of the two out"
            )
        fields = named | fields
    model_type = fields.pop("model_type", "vit")
    if model_type not in FAMILIES:
        raise UsageError(f"shape.model_type: no encoder '{model_type}' to train; {nearest(str(model_type), FAMILIES)}")
    register_llm_encoder()
    is_decoder = model_type == "unclipped_llm_encoder"
    check_fields(known_config(model_type, "shape"), fields, "shape")
    if is_decoder:
        merged: dict[str, Any] = {"patch_size": 12, "text_config": _SMALL_DECODER} | fields
    else:
        widths = {"mlp_ratio": 3} if model_type.startswith("dinov2") else {"intermediate_size": 384}
        merged = _SMALL | widths | fields | ({"image_size": image_size} if image_size is not None else {})
        for name in ("image_size", "patch_size"):
            if not isinstance(merged[name], int):
                raise UsageError(f"shape.{name}: expected one number of pixels (square), found {merged[name]!r}")
        if merged["image_size"] % merged["patch_size"]:
            raise UsageError(
                f"shape: image_size {merged['image_size']} is no multiple of patch_size {merged['patch_size']}"
            )
    encoder = build_encoder(config_from_fields(model_type, merged, "shape"))
    embeddings: Any = getattr(encoder.model, "embeddings", None)
    if embeddings is not None:
        for name in ("position_embeddings", "cls_token", "register_tokens"):
            if (table := getattr(embeddings, name, None)) is not None:
                nn.init.trunc_normal_(table, std=TOKEN_STD, a=-2 * TOKEN_STD, b=2 * TOKEN_STD)
    return Trunk(encoder, maskable=maskable)


def save_trunk(trunk: Trunk, folder: Path, rule: ImageRule) -> None:
    """Write the encoder as a transformers folder with its image processor, without the mask token and without dropped
    paths, which belong to this training and not to what is made of the encoder.

    `rule`: side in pixels (`size`), mean and standard deviation that it was trained with.
    """
    with whole_folder(folder) as temporary, quiet():
        trunk.encoder.model.save_pretrained(temporary)
        description = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        if description.get("drop_path_rate"):
            write_json(temporary / "config.json", description | {"drop_path_rate": 0.0})
        write_image_processor(temporary, rule)


def write_image_processor(folder: Path, rule: ImageRule) -> None:
    """Write an encoder's `preprocessor_config.json`: stretch to the `size` of `rule`, then its mean and deviation."""
    assert rule.size is not None
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": rule.size[0], "width": rule.size[1]},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(rule.mean),
        "image_std": list(rule.std),
    }
    write_json(folder / "preprocessor_config.json", processor)
