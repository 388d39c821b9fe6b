"""What an objective trained beside the encoder that a pretraining starts from: gone on with when it is asked to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.data.sources import expanded
from unclipped.encoders.checkpoint import checkpoint_folder
from unclipped.encoders.source import LLM_PREFIX
from unclipped.objectives.autoencoder_folder import load_autoencoder
from unclipped.objectives.dino_side import DINO_HEADS, load_dino_heads, sizes_of
from unclipped.objectives.masked_autoencoder import MaskedAutoencoder
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.objectives.side_files import read_side
from unclipped.training.config import PretrainConfig


@dataclass(frozen=True)
class TextSide:
    """What an encoder's folder holds of an objective's text side."""

    folder: Path
    tensors: dict[str, Tensor]
    tokenizer: Any


def goes_on(config: PretrainConfig) -> bool:
    """Whether heads and decoders go on with what stands beside the encoder."""
    return config.init_heads == "continue"


def init_folder(config: PretrainConfig) -> Path:
    """The folder of `config.init`. Raises as `checkpoint_folder`."""
    assert config.init is not None
    return checkpoint_folder(expanded(config.init.removeprefix(LLM_PREFIX), "init"))


def heads_notes(config: PretrainConfig, side: str | None) -> list[str]:
    """What becomes of the parts that the objective adds to an encoder under `init`. `side`: the folder that keeps them
    beside it; None: none does."""
    if config.init is None:
        return []
    kept = init_folder(config) / side if side is not None else None
    if goes_on(config):
        return [f"what the objective adds to the encoder goes on from {kept or config.init}"]
    if kept is not None and kept.is_dir():
        return [f"{kept} is left aside; init_heads: continue would go on with it"]
    return ["what the objective adds to the encoder starts fresh"]


def text_side(config: PretrainConfig, name: str) -> TextSide:
    """The text side in the folder `name` beside the encoder. Raises CheckpointError without one, or for another's."""
    folder = init_folder(config) / name

    def parse(fields: dict[str, Any]) -> str:
        return fields.get("objective", "captioning")

    found, tensors, tokenizer = read_side(folder, parse, what=f"a {name}", objectives=config.objective)
    if found != config.objective:
        raise CheckpointError(
            f"{folder}: was trained by {found}, and here {config.objective} would go on with it; set init_heads: fresh"
        )
    return TextSide(folder, tensors, tokenizer)


@torch.no_grad()
def take_dino_heads(config: PretrainConfig, objective: Any) -> None:
    """Give student and teacher of a DinoV2Objective the heads and the mask token of the teacher that was saved.

    Raises CheckpointError when there are none, or when they lack one or differ in size from what the recipe says.
    """
    folder = init_folder(config)
    heads = load_dino_heads(folder)
    stored = heads.named_heads()
    for name in ("dino_head", "ibot_head"):
        own = getattr(objective.student, name)
        if own is None:
            continue
        found = sizes_of(stored[name]) if name in stored else "none"
        if found != sizes_of(own):
            raise CheckpointError(
                f"{folder / DINO_HEADS}: expected {name} as the recipe says, {sizes_of(own)}, found {found}; change "
                "head_hidden, bottleneck, ibot_bottleneck or prototypes under dinov2, or set init_heads: fresh"
            )
        for side in (objective.student, objective.teacher):
            getattr(side, name).load_state_dict(stored[name].state_dict())
    if heads.mask_token is not None:
        for side in (objective.student, objective.teacher):
            side.trunk.mask_token.copy_(heads.mask_token)


def autoencoder(config: PretrainConfig) -> MaskedAutoencoder:
    """Encoder and decoder of a masked autoencoder's folder. Raises UsageError for a section that says otherwise, and as
    `load_autoencoder`."""
    if config.masked_autoencoder != MaskedAutoencoderConfig():
        raise UsageError(
            "masked_autoencoder: the folder under init names mask and decoder itself; leave this section out, or set "
            "init_heads: fresh"
        )
    return load_autoencoder(init_folder(config))
