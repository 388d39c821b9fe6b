"""The tensors that a vision transformer has under original names: their shapes, and their names in published folders.

Names and order of parts: the published code of DINOv2 (arXiv 2304.07193) and MAE (arXiv 2111.06377), where query, key
and value are one matrix; and the folders that transformers loads, whatever it calls the same tensors in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from unclipped.encoders.importing.shape import OriginalShape


@dataclass(frozen=True)
class Place:
    """Where a tensor goes."""

    shape: tuple[int, ...]
    """Its own."""
    names: tuple[str, ...]
    """In a published folder; several share its rows evenly."""


Table = dict[str, Place]
"""Original name → place."""


def encoder_table(shape: OriginalShape) -> Table:
    """Every tensor of an encoder as a ViTModel or as a Dinov2Model with or without registers."""
    width = shape.width
    table: Table = {
        "cls_token": Place((1, 1, width), ("embeddings.cls_token",)),
        "pos_embed": Place((1, shape.patches + 1, width), ("embeddings.position_embeddings",)),
        "patch_embed.proj.weight": Place(
            (width, shape.channels, shape.patch, shape.patch), ("embeddings.patch_embeddings.projection.weight",)
        ),
        "patch_embed.proj.bias": Place((width,), ("embeddings.patch_embeddings.projection.bias",)),
        **_norm("norm", "layernorm", width),
    }
    if shape.registers:
        table["register_tokens"] = Place((1, shape.registers, width), ("embeddings.register_tokens",))
    if shape.family != "vit" and shape.has_mask_token:
        table["mask_token"] = Place((1, width), ("embeddings.mask_token",))
    for number in range(shape.depth):
        theirs, ours = f"blocks.{number}", f"encoder.layer.{number}"
        if shape.family == "vit":
            table |= _vit_block(theirs, ours, width, shape.feed_forward, has_qkv_bias=shape.has_qkv_bias)
            continue
        table |= _norm(f"{theirs}.norm1", f"{ours}.norm1", width) | _norm(f"{theirs}.norm2", f"{ours}.norm2", width)
        table |= _attention(theirs, ours, width, has_qkv_bias=shape.has_qkv_bias)
        if shape.has_layer_scale:
            for index in (1, 2):
                table[f"{theirs}.ls{index}.gamma"] = Place((width,), (f"{ours}.layer_scale{index}.lambda1",))
        hidden = shape.feed_forward
        if shape.is_gated:
            table |= _linear(f"{theirs}.mlp.w12", (f"{ours}.mlp.weights_in",), width, 2 * hidden)
            table |= _linear(f"{theirs}.mlp.w3", (f"{ours}.mlp.weights_out",), hidden, width)
        else:
            table |= _linear(f"{theirs}.mlp.fc1", (f"{ours}.mlp.fc1",), width, hidden)
            table |= _linear(f"{theirs}.mlp.fc2", (f"{ours}.mlp.fc2",), hidden, width)
    return table


def autoencoder_table(shape: OriginalShape, *, width: int, depth: int, hidden: int) -> Table:
    """Every tensor of a ViTMAEForPreTraining: that encoder, and a decoder of this width, depth and inner width."""
    table = {
        name: Place(place.shape, tuple(f"vit.{ours}" for ours in place.names))
        for name, place in encoder_table(shape).items()
    }
    table["mask_token"] = Place((1, 1, width), ("decoder.mask_token",))
    table["decoder_pos_embed"] = Place((1, shape.patches + 1, width), ("decoder.decoder_pos_embed",))
    table |= _linear("decoder_embed", ("decoder.decoder_embed",), shape.width, width)
    table |= _norm("decoder_norm", "decoder.decoder_norm", width)
    table |= _linear("decoder_pred", ("decoder.decoder_pred",), width, shape.channels * shape.patch**2)
    for number in range(depth):
        table |= _vit_block(f"decoder_blocks.{number}", f"decoder.decoder_layers.{number}", width, hidden)
    return table


def _vit_block(theirs: str, ours: str, width: int, hidden: int, *, has_qkv_bias: bool = True) -> Table:
    return {
        **_norm(f"{theirs}.norm1", f"{ours}.layernorm_before", width),
        **_attention(theirs, ours, width, has_qkv_bias=has_qkv_bias),
        **_norm(f"{theirs}.norm2", f"{ours}.layernorm_after", width),
        **_linear(f"{theirs}.mlp.fc1", (f"{ours}.intermediate.dense",), width, hidden),
        **_linear(f"{theirs}.mlp.fc2", (f"{ours}.output.dense",), hidden, width),
    }


def _attention(theirs: str, ours: str, width: int, *, has_qkv_bias: bool) -> Table:
    parts = tuple(f"{ours}.attention.attention.{part}" for part in ("query", "key", "value"))
    table = _linear(f"{theirs}.attn.qkv", parts, width, 3 * width)
    if not has_qkv_bias:
        del table[f"{theirs}.attn.qkv.bias"]
    return table | _linear(f"{theirs}.attn.proj", (f"{ours}.attention.output.dense",), width, width)


def _linear(theirs: str, ours: tuple[str, ...], inputs: int, outputs: int) -> Table:
    return {
        f"{theirs}.weight": Place((outputs, inputs), tuple(f"{name}.weight" for name in ours)),
        f"{theirs}.bias": Place((outputs,), tuple(f"{name}.bias" for name in ours)),
    }


def _norm(theirs: str, ours: str, width: int) -> Table:
    return {f"{theirs}.{kind}": Place((width,), (f"{ours}.{kind}",)) for kind in ("weight", "bias")}
