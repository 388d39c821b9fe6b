"""The shape of a vision transformer, read off its tensors under original names.

Widths, depth, patch, image side, registers and the kind of feed-forward are in the tensors' shapes. The number of
attention heads is nowhere in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.checkpoint import shortened
from unclipped.encoders.vit_shapes import heads_of_width

BLOCK = re.compile(r"(blocks|decoder_blocks)\.(?:\d+\.)?(\d+)\.(.+)")
"""A tensor of a block: which blocks, its number (after that of a chunk, where blocks are nested), the rest."""
_EPS = 1e-6
"""Of every layer norm in this code."""
_LAYER_SCALE = 1e-5
"""Start value of layer scales in training; only fresh weights see it."""


@dataclass(frozen=True)
class OriginalShape:
    """What the tensors say about the encoder."""

    family: str
    width: int
    depth: int
    heads: int
    patch: int
    side: int
    """Image side in pixels that the position table was made for."""
    channels: int
    feed_forward: int
    """Width inside the feed-forward layers."""
    is_gated: bool
    """SwiGLU instead of a GELU MLP."""
    has_qkv_bias: bool
    has_layer_scale: bool
    registers: int
    has_mask_token: bool

    @property
    def patches(self) -> int:
        """Of an image of that side."""
        return (self.side // self.patch) ** 2

    def config_fields(self) -> dict[str, Any]:
        """Fields of the transformers configuration. Raises CheckpointError for a width that it cannot state."""
        fields: dict[str, Any] = {
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "patch_size": self.patch,
            "image_size": self.side,
            "num_channels": self.channels,
            "qkv_bias": self.has_qkv_bias,
            "layer_norm_eps": _EPS,
        }
        if not self.family.startswith("dinov2"):
            return fields | {"intermediate_size": self.feed_forward}
        ratio = self._ratio()
        fields |= {"mlp_ratio": ratio, "use_swiglu_ffn": self.is_gated}
        fields["layerscale_value"] = _LAYER_SCALE if self.has_layer_scale else 1.0
        if self.registers:
            return fields | {"num_register_tokens": self.registers}
        return fields | {"use_mask_token": self.has_mask_token}

    def _ratio(self) -> int:
        for ratio in range(1, 33):
            inner = ratio * self.width
            if self.feed_forward == ((int(inner * 2 / 3) + 7) // 8 * 8 if self.is_gated else inner):
                return ratio
        kind = "SwiGLU" if self.is_gated else "feed-forward"
        raise CheckpointError(
            f"a {kind} of width {self.feed_forward} in a model of width {self.width} is that of no whole mlp_ratio, "
            f"which is how a {self.family} states it; such a model cannot be saved in the transformers format"
        )


def read_shape(path: Any, tensors: dict[str, Tensor], heads: int | None) -> OriginalShape:
    """The shape that an encoder's tensors have. heads: attention heads, where their number is known.

    Raises CheckpointError when these are no tensors of such an encoder, UsageError for the number of heads.
    """
    depth = depth_of(tensors, "blocks")
    needed = ("patch_embed.proj.weight", "pos_embed")
    if any(name not in tensors for name in needed) or not depth:
        found = shortened(sorted(tensors), 5) or "nothing"
        raise CheckpointError(
            f"{path}: no vision transformer under original names ({', '.join(needed)}, blocks.0.…); found {found}"
        )
    kernel, table = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise CheckpointError(
            f"{path}: patch_embed.proj.weight: expected (width, channels, patch, patch), found {tuple(kernel.shape)}"
        )
    width, channels, patch = kernel.shape[:3]
    rows = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 else 0
    if table.ndim != 3 or rows * rows != table.shape[1] - 1 or not rows:
        raise CheckpointError(
            f"{path}: pos_embed: expected (1, 1 + rows², {width}), the class token and a square of patches, found "
            f"{tuple(table.shape)}"
        )
    is_gated = any(name.endswith(".mlp.w12.weight") for name in tensors)
    inner = [value for name, value in tensors.items() if re.fullmatch(r"blocks\.\d+\.mlp\.(fc2|w3)\.weight", name)]
    if not inner or inner[0].ndim != 2:
        raise CheckpointError(f"{path}: no feed-forward weights (blocks.0.mlp.fc2.weight or .w3.weight) are there")
    has_scale = any(re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name) for name in tensors)
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    dinov2 = "dinov2_with_registers" if registers else "dinov2"
    return OriginalShape(
        family=dinov2 if has_scale or registers or is_gated else "vit",
        width=width,
        depth=depth,
        heads=heads_of(path, width, heads, "--attention-heads"),
        patch=patch,
        side=rows * patch,
        channels=channels,
        feed_forward=inner[0].shape[1],
        is_gated=is_gated,
        has_qkv_bias=any(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name) for name in tensors),
        has_layer_scale=has_scale,
        registers=registers,
        has_mask_token="mask_token" in tensors,
    )


def depth_of(tensors: dict[str, Tensor], blocks: str) -> int:
    """Number of blocks, from the highest that a tensor names. blocks: `blocks` or `decoder_blocks`."""
    numbers = [int(block[2]) for name in tensors if (block := BLOCK.fullmatch(name)) and block[1] == blocks]
    return max(numbers, default=-1) + 1


def heads_of(path: Any, width: int, given: int | None, option: str, known: int | None = None) -> int:
    """Attention heads: as given by `option`, else those known, else those of the published shapes of this width.

    Raises UsageError when there are none or when they do not divide the width.
    """
    heads = given or known or heads_of_width(width)
    if heads is None:
        raise UsageError(
            f"{path}: the number of attention heads is not in the file, and no published shape has the width {width}; "
            f"give {option}"
        )
    if width % heads:
        raise UsageError(f"{option} {heads}: does not divide the width {width} of {path}; give the number it has")
    return heads
