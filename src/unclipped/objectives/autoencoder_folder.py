"""A masked autoencoder whole, decoder included, from a folder of ViTMAEForPreTraining: its training can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from unclipped.core.errors import CheckpointError
from unclipped.encoders.build import load_encoder
from unclipped.encoders.checkpoint import checkpoint_folder, load_weights, raise_misfits, read_config
from unclipped.encoders.vit_mae_init import sine_cosine_table
from unclipped.objectives.masked_autoencoder import MaskedAutoencoder
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.objectives.trunk import Trunk

_CLOSE = 1e-4
"""How far stored positions may be from the sines and cosines that they are."""
_DECODER = "decoder."


def decoder_options(config: ViTMAEConfig) -> MaskedAutoencoderConfig:
    """What a ViTMAE's configuration says about mask and decoder."""
    return MaskedAutoencoderConfig(
        mask_ratio=config.mask_ratio,
        normalise_pixels=config.norm_pix_loss,
        decoder_width=config.decoder_hidden_size,
        decoder_blocks=config.decoder_num_hidden_layers,
        decoder_heads=config.decoder_num_attention_heads,
        decoder_hidden=config.decoder_intermediate_size,
    )


def load_autoencoder(source: str | Path) -> MaskedAutoencoder:
    """The masked autoencoder of a ViTMAEForPreTraining folder or hub id, in float32.

    Raises CheckpointError when it is no such folder, has no decoder, or has one with positions of its own.
    """
    folder = checkpoint_folder(source)
    config: Any = read_config(folder)
    if config.model_type != "vit_mae":
        raise CheckpointError(f"{folder}: expected a vit_mae with its decoder, found a {config.model_type}")
    encoder, _ = load_encoder(str(folder))
    model = MaskedAutoencoder(Trunk(encoder), decoder_options(config), eps=config.layer_norm_eps)
    theirs = _stored_decoder(folder, config)
    table = theirs.pop("decoder_pos_embed")[0, 1:]  # (n, d)
    side = config.image_size // config.patch_size
    if (table - sine_cosine_table(side, side, config.decoder_hidden_size)).abs().max() > _CLOSE:
        raise CheckpointError(
            f"{folder}: decoder.decoder_pos_embed holds positions that are not the fixed sines and cosines of a masked "
            "autoencoder; its decoder cannot go on here"
        )
    patch = config.patch_size
    model.decoder.load_state_dict(_own_names(theirs, config.decoder_num_hidden_layers, patch, config.num_channels))
    return model


def _stored_decoder(folder: Path, config: ViTMAEConfig) -> dict[str, Tensor]:
    """The decoder's tensors under the names that they have in transformers."""
    model, info = load_weights(ViTMAEForPreTraining, folder, config, dtype=torch.float32)
    missing, misshaped = sorted(info["missing_keys"]), [str(entry) for entry in sorted(info["mismatched_keys"])]
    raise_misfits(
        f"{folder} as a masked autoencoder",
        missing,
        sorted(info["unexpected_keys"]),
        misshaped,
        remedy="give a folder that holds encoder and decoder (unclipped import-encoder --decoder writes one)",
    )
    return {
        name.removeprefix(_DECODER): value for name, value in model.state_dict().items() if name.startswith(_DECODER)
    }


def _own_names(theirs: dict[str, Tensor], blocks: int, patch: int, channels: int) -> dict[str, Tensor]:
    """The tensors of a PixelDecoder. A patch's values run row, column, channel there, and channel, row, column here."""
    own = {"mask_token": theirs["mask_token"].reshape(-1)}
    for kind in ("weight", "bias"):
        for ours, name in (("embed", "decoder_embed"), ("norm", "decoder_norm")):
            own[f"{ours}.{kind}"] = theirs[f"{name}.{kind}"]
        pixels = theirs[f"decoder_pred.{kind}"].unflatten(0, (patch, patch, channels))
        own[f"predict.{kind}"] = pixels.movedim(2, 0).flatten(0, 2)
        for number in range(blocks):
            layer, block = f"decoder_layers.{number}", f"blocks.{number}"
            parts = [theirs[f"{layer}.attention.{letter}_proj.{kind}"] for letter in "qkv"]
            own[f"{block}.qkv.{kind}"] = torch.cat(parts)
            for ours, name in (
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("out", "attention.o_proj"),
                ("up", "mlp.fc1"),
                ("down", "mlp.fc2"),
            ):
                own[f"{block}.{ours}.{kind}"] = theirs[f"{layer}.{name}.{kind}"]
    return own
