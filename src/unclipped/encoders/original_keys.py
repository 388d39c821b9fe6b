"""Vision transformers under original names (DINOv2, Web-SSL, DINO, MAE) made into models of transformers.

Widths, depth, patch, image side, registers and the kind of feed-forward are read off the tensors' shapes. The number of
attention heads is nowhere in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, ViTMAEForPreTraining

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.checkpoint import quiet, raise_misfits, shortened
from unclipped.encoders.import_config import ImportConfig
from unclipped.encoders.original_files import OriginalWeights
from unclipped.encoders.original_names import Source, decoder_sources, trunk_sources
from unclipped.encoders.spec import Objective, declare_objective
from unclipped.encoders.vit_shapes import heads_of_width

_BLOCK = re.compile(r"(blocks|decoder_blocks)\.(?:\d+\.)?(\d+)\.(.+)")
_DECODER = ("decoder_embed.", "decoder_pos_embed", "decoder_blocks.", "decoder_norm.", "decoder_pred.")
_CLASSIFIER = "head."
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


@dataclass
class ImportedEncoder:
    """A transformers model with the file's weights, and what became of each tensor."""

    model: PreTrainedModel
    shape: OriginalShape
    objective: Objective
    taken: list[str]
    """Names in the file."""
    left_out: dict[str, str]
    """Name in the file → why."""
    new: dict[str, str]
    """Name in the model → what it is filled with, and why."""


def convert(weights: OriginalWeights, config: ImportConfig) -> ImportedEncoder:
    """The encoder of an original file as a transformers model: Dinov2Model, Dinov2WithRegistersModel, ViTModel, or
    ViTMAEForPreTraining with its decoder.

    Without layer scales, registers and gates it is a ViTModel. Raises CheckpointError that lists every missing,
    unexpected and misshaped tensor, or names what is no encoder; UsageError for heads that do not divide a width, for a
    width whose heads are not known, for a classifier without a declared objective, and for a decoder that is not there.
    """
    path, left_out = weights.path, dict(weights.left_out)
    tensors = _renamed(weights)
    for name in list(tensors):
        if any(fnmatch(name, pattern) for pattern in config.leave_out):
            del tensors[name]
            left_out[name] = "as asked for"
    shape = read_shape(weights.path, tensors, config.attention_heads)
    objective = config.objective
    if any(name.startswith(_CLASSIFIER) for name in tensors):
        if objective is None:
            raise UsageError(
                f"{path}: holds a classifier (head.…), so the encoder may have been trained on labels; say how it was "
                "with --objective supervised or --objective self_supervised"
            )
        left_out |= _take_out(tensors, (_CLASSIFIER,), "a classifier")
    is_autoencoder = any(name.startswith(_DECODER) for name in tensors)
    if config.decoder and not is_autoencoder:
        raise UsageError(f"{path}: holds no decoder of a masked autoencoder; leave --decoder out")
    if config.decoder and shape.family != "vit":
        raise UsageError(f"{path}: a {shape.family} with a masked autoencoder's decoder has no transformers class")
    if not config.decoder and is_autoencoder:
        reason = "the masked autoencoder's decoder; --decoder keeps it"
        left_out |= _take_out(tensors, (*_DECODER, "mask_token"), reason)
    elif not config.decoder and shape.family == "vit":
        left_out |= _take_out(tensors, ("mask_token",), "a vit takes no mask token")
    model, sources = _empty(path, shape, tensors, config)
    new = _fill(path, model, sources, tensors, shape)
    declared: Objective = objective or "self_supervised"
    declare_objective(model.config, declared)
    return ImportedEncoder(model.eval(), shape, declared, sorted(tensors), left_out, new)


def read_shape(path: Any, tensors: dict[str, Tensor], heads: int | None) -> OriginalShape:
    """The shape that an encoder's tensors have. heads: attention heads, where their number is known.

    Raises CheckpointError when these are no tensors of such an encoder, UsageError for the number of heads.
    """
    depth = _depth(tensors, "blocks")
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
        heads=_heads(path, width, heads, "--attention-heads"),
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


def _renamed(weights: OriginalWeights) -> dict[str, Tensor]:
    """The encoder's tensors with blocks counted through: `blocks.2.7.norm1` of a chunked model is `blocks.7.norm1`.

    In chunked models the number inside a chunk counts from the first block of all.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in weights.encoder.items():
        block = _BLOCK.fullmatch(name)
        plain = f"{block[1]}.{block[2]}.{block[3]}" if block else name
        if plain in tensors:
            raise CheckpointError(f"{weights.path}: two tensors are {plain} (one of them {name}): blocks counted twice")
        tensors[plain] = value
    return tensors


def _take_out(tensors: dict[str, Tensor], beginnings: tuple[str, ...], reason: str) -> dict[str, str]:
    names = [name for name in tensors if name.startswith(beginnings)]
    for name in names:
        del tensors[name]
    return dict.fromkeys(names, reason)


def _depth(tensors: dict[str, Tensor], blocks: str) -> int:
    numbers = [int(block[2]) for name in tensors if (block := _BLOCK.fullmatch(name)) and block[1] == blocks]
    return max(numbers, default=-1) + 1


def _heads(path: Any, width: int, given: int | None, option: str, known: int | None = None) -> int:
    heads = given or known or heads_of_width(width)
    if heads is None:
        raise UsageError(
            f"{path}: the number of attention heads is not in the file, and no published shape has the width {width}; "
            f"give {option}"
        )
    if width % heads:
        raise UsageError(f"{option} {heads}: does not divide the width {width} of {path}; give the number it has")
    return heads


def _empty(
    path: Any, shape: OriginalShape, tensors: dict[str, Tensor], config: ImportConfig
) -> tuple[PreTrainedModel, dict[str, Source]]:
    """The model without memory, and where each of its parameters comes from."""
    try:
        fields = shape.config_fields()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    sources = trunk_sources(shape.depth, is_vit=shape.family == "vit", is_gated=shape.is_gated)
    if not config.decoder:
        options = {"add_pooling_layer": False} if shape.family == "vit" else {}
        with torch.device("meta"), quiet():
            return AutoModel.from_config(AutoConfig.for_model(shape.family, **fields), **options), sources
    embed, inner = tensors.get("decoder_embed.weight"), tensors.get("decoder_blocks.0.mlp.fc1.weight")
    if embed is None or inner is None:
        raise CheckpointError(f"{path}: the decoder lacks decoder_embed.weight or decoder_blocks.0.mlp.fc1.weight")
    width, depth = embed.shape[0], _depth(tensors, "decoder_blocks")
    fields |= {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": depth,
        "decoder_num_attention_heads": _heads(
            path, width, config.decoder_heads, "--decoder-heads", 16 if width == 512 else None
        ),
        "decoder_intermediate_size": inner.shape[0],
        "norm_pix_loss": config.normalised_pixels,
    }
    sources = {f"vit.{name}": source for name, source in sources.items()} | decoder_sources(depth)
    with torch.device("meta"), quiet():
        return ViTMAEForPreTraining(AutoConfig.for_model("vit_mae", **fields)), sources


def _fill(
    path: Any, model: PreTrainedModel, sources: dict[str, Source], tensors: dict[str, Tensor], shape: OriginalShape
) -> dict[str, str]:
    """Give the model its tensors; what it needs and the architecture of the file has not, is filled neutrally."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    new: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for name, size in expected.items():
        if not shape.has_layer_scale and "layer_scale" in name:
            state[name], new[name] = torch.ones(size), "ones: the file has no layer scales"
        elif not shape.has_mask_token and name == "embeddings.mask_token":
            state[name], new[name] = torch.zeros(size), "zeros: the file has no mask token"
    missing, misshaped = [], []
    for name in expected.keys() - state.keys():
        original, part, parts = sources[name]
        value, size = tensors.get(original), expected[name]
        if value is None:
            missing.append(original)
        elif value.shape != (size[0] * parts, *size[1:]):
            misshaped.append(f"{original} (found {tuple(value.shape)}, expected {(size[0] * parts, *size[1:])})")
        elif not value.is_floating_point():
            misshaped.append(f"{original} (found {value.dtype}, expected floating point)")
        else:
            # A part of a larger tensor would be saved with all of it.
            state[name] = value if parts == 1 else value.chunk(parts)[part].clone()
    used = {sources[name][0] for name in expected if name in sources}
    extra = sorted(tensors.keys() - used)
    raise_misfits(
        str(path),
        sorted(set(missing)),
        extra,
        sorted(set(misshaped)),
        remedy="give the whole file of one model" + (", or leave tensors out by --leave-out NAME" if extra else ""),
    )
    if len({value.dtype for value in state.values()}) > 1:
        state = {name: value.float() for name, value in state.items()}
    dtype = next(value.dtype for name, value in state.items() if name not in new)
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, strict=True, assign=True)
    return new
