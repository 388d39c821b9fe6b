"""Run by torchrun in test_pretraining_distributed.py: pretrain encoders one after the other, as the arguments say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pair_support import VIT, write_pairs
from torch import Tensor
from torchrun_support import leave

from unclipped.data.config import DataConfig, SourceConfig
from unclipped.images.config import ImageRule
from unclipped.objectives import dinov2
from unclipped.objectives.base import Objective
from unclipped.objectives.dino_losses import koleo_loss
from unclipped.objectives.trunk import build_trunk, save_trunk
from unclipped.training.config import PretrainConfig
from unclipped.training.pretrain import pretrain

PAIRS = {
    "embedding_size": 8, "context_length": 12, "text_width": 16, "text_layers": 1, "text_heads": 2,
    "decoder_layers": 1, "caption_queries": 4,
}  # fmt: skip
DINO = {"local_crops": 2, "local_size": 16, "prototypes": 12, "head_hidden": 16, "bottleneck": 8}
DINO |= {"frozen_prototype_steps": 2, "teacher_momentum": (0.8, 1.0), "teacher_temperature_steps": 3}
MAE = {"decoder_width": 16, "decoder_blocks": 2, "decoder_heads": 2}


class Stopped(Exception):
    """Raised by the test in place of a crash."""


def write_teacher(folder: Path) -> None:
    """A small encoder with fresh weights for distillation."""
    torch.manual_seed(7)
    trunk = build_trunk(VIT | {"hidden_size": 24}, image_size=32)
    rule = ImageRule(rule="squash", size=(32, 32), patch_size=(8, 8), mean=(0.2, 0.5, 0.4), std=(0.3, 0.2, 0.5))
    save_trunk(trunk, folder, rule)


def prepare(folder: Path) -> None:
    """What the runs read: pairs, and a teacher."""
    write_pairs(folder / "pairs")
    write_teacher(folder / "teacher")


def config(folder: Path, objective: str, **fields: Any) -> PretrainConfig:
    """A tiny run over the pairs or generated shapes; fields of sections are merged into the tiny ones."""
    is_pairs = objective in ("contrastive", "sigmoid", "coca")
    source = SourceConfig(source=str(folder / "pairs") if is_pairs else "generated:shapes")
    training = {"log_every_steps": 1, "save_every_steps": 2, "threads": 1, "device": "cpu"}
    training |= {"optimizer": {"weight_decay": 0.1}} | fields.pop("training", {})
    given: dict[str, Any] = {
        "shape": {"model_type": "vit"} | VIT,
        "image_size": 32,
        "data": DataConfig(sources=(source,)),
        "tokenizer": {"vocabulary_size": 280},
        "pairs": PAIRS | fields.pop("pairs", {}),
        "dinov2": DINO | fields.pop("dinov2", {}),
        "masked_autoencoder": MAE if objective == "masked_autoencoder" else {},
        "distill": {"teacher": str(folder / "teacher")} if objective == "distill" else None,
        "steps": 5,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "training": training,
    }
    return PretrainConfig.model_validate({"objective": objective} | given | fields)


@contextmanager
def koleo_in_shares(shares: int) -> Iterator[None]:
    """Look for neighbours as so many processes do: within each share of the batch."""

    def in_shares(features: Tensor) -> Tensor:
        return torch.stack([koleo_loss(share) for share in features.chunk(shares)]).mean()

    dinov2.koleo_loss = in_shares
    try:
        yield
    finally:
        dinov2.koleo_loss = koleo_loss


def run(folder: Path, options: dict[str, Any]) -> None:
    """One run into `folder / name`; with `crash_after` it ends after so many steps, without a word."""
    options = dict(options)
    name, crash_after, is_resumed = options.pop("name"), options.pop("crash_after", None), options.pop("resume", False)
    seen = 0
    kind = dinov2.DinoV2Objective if options["objective"] == "dinov2" else Objective
    before = kind.after_step

    def counted(self: Any) -> None:
        nonlocal seen
        before(self)
        seen += 1
        if seen == crash_after:
            raise Stopped

    kind.after_step = counted  # type: ignore[method-assign]
    try:
        pretrain(config(folder, **options), folder / name, resume=is_resumed)
    except Stopped:
        return
    finally:
        kind.after_step = before  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    for options in json.loads(sys.argv[1]):
        run(Path(sys.argv[2]), options)
    leave()


if __name__ == "__main__":
    main()
