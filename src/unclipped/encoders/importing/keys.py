"""Vision transformers under original names (DINOv2, Web-SSL, DINO, MAE) made into those of published folders."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.checkpoint import raise_misfits
from unclipped.encoders.importing.config import ImportConfig
from unclipped.encoders.importing.files import OriginalWeights
from unclipped.encoders.importing.names import Table, autoencoder_table, encoder_table
from unclipped.encoders.importing.shape import BLOCK, OriginalShape, depth_of, heads_of, read_shape
from unclipped.encoders.spec import Objective, declare_objective
from unclipped.encoders.weights import check_values

_DECODER = ("decoder_embed.", "decoder_pos_embed", "decoder_blocks.", "decoder_norm.", "decoder_pred.")
_CLASSIFIER = "head."
_CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
    "vit_mae": "ViTMAEForPreTraining",
}


@dataclass
class ImportedEncoder:
    """The file's weights as a transformers folder holds them, and what became of each tensor."""

    config: Any
    """The transformers configuration, which declares the objective."""
    tensors: dict[str, Tensor]
    """By their names in a published folder; of one dtype."""
    shape: OriginalShape
    objective: Objective
    taken: list[str]
    """Names in the file."""
    left_out: dict[str, str]
    """Name in the file → why."""
    new: dict[str, str]
    """Name in the folder → what it is filled with, and why."""

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        self.config.save_pretrained(folder)
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def convert(weights: OriginalWeights, config: ImportConfig) -> ImportedEncoder:
    """The encoder of an original file as a Dinov2Model, Dinov2WithRegistersModel, ViTModel, or ViTMAEForPreTraining
    with its decoder.

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
    shape = read_shape(path, tensors, config.attention_heads)
    if any(name.startswith(_CLASSIFIER) for name in tensors):
        if config.objective is None:
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
    try:
        fields = shape.config_fields()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    family, table = shape.family, encoder_table(shape)
    if config.decoder:
        family = "vit_mae"
        table, more = _decoder(path, shape, tensors, config)
        fields |= more
    published = _published(path, table, tensors)
    new = _neutral(published, shape)
    made = AutoConfig.for_model(family, **fields, architectures=[_CLASSES[family]])
    made.dtype = next(iter(published.values())).dtype
    objective: Objective = config.objective or "self_supervised"
    declare_objective(made, objective)
    return ImportedEncoder(made, published, shape, objective, sorted(tensors), left_out, new)


def _renamed(weights: OriginalWeights) -> dict[str, Tensor]:
    """The encoder's tensors with blocks counted through: `blocks.2.7.norm1` of a chunked model is `blocks.7.norm1`.

    In chunked models the number inside a chunk counts from the first block of all.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in weights.encoder.items():
        block = BLOCK.fullmatch(name)
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


def _decoder(
    path: Path, shape: OriginalShape, tensors: dict[str, Tensor], config: ImportConfig
) -> tuple[Table, dict[str, Any]]:
    """The places of encoder and decoder, and the decoder's fields of the configuration."""
    embed, inner = tensors.get("decoder_embed.weight"), tensors.get("decoder_blocks.0.mlp.fc1.weight")
    if embed is None or inner is None:
        raise CheckpointError(f"{path}: the decoder lacks decoder_embed.weight or decoder_blocks.0.mlp.fc1.weight")
    width, hidden, depth = embed.shape[0], inner.shape[0], depth_of(tensors, "decoder_blocks")
    published = 16 if width == 512 else None  # the decoder of every published masked autoencoder
    heads = heads_of(path, width, config.decoder_heads, "--decoder-heads", published)
    return autoencoder_table(shape, width=width, depth=depth, hidden=hidden), {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": depth,
        "decoder_num_attention_heads": heads,
        "decoder_intermediate_size": hidden,
        "norm_pix_loss": config.normalised_pixels,
    }


def _published(path: Path, table: Table, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under published names, of one dtype. Raises CheckpointError listing all that do not fit the table."""
    misshaped = [
        f"{name} (found {tuple(value.shape)}, expected {table[name].shape})"
        if value.shape != table[name].shape
        else f"{name} (found {value.dtype}, expected floating point)"
        for name, value in sorted(tensors.items())
        if name in table and (value.shape != table[name].shape or not value.is_floating_point())
    ]
    missing, extra = sorted(table.keys() - tensors.keys()), sorted(tensors.keys() - table.keys())
    remedy = "give the whole file of one model" + (", or leave tensors out by --leave-out NAME" if extra else "")
    raise_misfits(str(path), missing, extra, misshaped, remedy=remedy)
    check_values(str(path), tensors)
    dtypes = {value.dtype for value in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    published: dict[str, Tensor] = {}
    for name, place in table.items():
        parts = tensors[name].to(dtype).chunk(len(place.names))
        published |= dict(zip(place.names, parts, strict=True))
    return published


def _neutral(published: dict[str, Tensor], shape: OriginalShape) -> dict[str, str]:
    """Add what the transformers class has and the file's architecture has not, so that it changes nothing."""
    new: dict[str, str] = {}
    like = next(iter(published.values()))
    if shape.family != "vit" and not shape.has_layer_scale:
        for number in range(shape.depth):
            for index in (1, 2):
                name = f"encoder.layer.{number}.layer_scale{index}.lambda1"
                published[name] = like.new_ones(shape.width)
                new[name] = "ones: the file has no layer scales"
    if shape.registers and not shape.has_mask_token:
        name = "embeddings.mask_token"
        published[name], new[name] = like.new_zeros(1, shape.width), "zeros: the file has no mask token"
    return new
