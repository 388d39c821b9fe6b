"""Run by torchrun in test_training_distributed.py: train tiny models one after the other, as the arguments say."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchrun_support import leave

from support.tiny_models import tiny_vlm
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.objectives.answer import AnswerObjective
from unclipped.training.config import OptimizerConfig, StageConfig, TrainingConfig
from unclipped.training.run import train_stages

ALL = {"vision": 1e-2, "connector": 1e-2, "text": 1e-2}
SCRATCH = "scratch"


class Stopped(Exception):
    """Raised by the test in place of a crash."""


def train(folder: Path, options: dict[str, Any]) -> None:
    """One run into `folder / options["name"]`; with `crash_after` it ends after so many steps, without a word."""
    rank = os.environ.get("RANK", "0")
    model, processor, _ = tiny_vlm(folder / f"{SCRATCH}-{rank}")
    images = SourceConfig(source="generated:characters")
    text_only = SourceConfig(source="generated:characters", options={"as_text": True}, weight=options["text"])
    stages = [
        StageConfig(name="connector", train={"connector": 1e-2}, steps=2, batch_size=4),
        StageConfig(
            name="all", train=ALL, steps=5, batch_size=4, gradient_accumulation=options["accumulation"],
            auxiliary={"ctc": 0.3},
        ),
    ]  # fmt: skip
    training = TrainingConfig(
        device="cpu",
        parallel=options.get("parallel", "ddp"),
        optimizer=OptimizerConfig(name=options["optimizer"]),
        log_every_steps=1,
        save_every_steps=2,
        threads=1,
    )
    seen = 0

    def after_step(self: AnswerObjective) -> None:
        nonlocal seen
        seen += 1
        if seen == options.get("crash_after"):
            raise Stopped

    AnswerObjective.after_step = after_step  # type: ignore[method-assign]
    data = DataConfig(sources=(images, text_only))
    try:
        train_stages(
            model, processor, stages, training, data, folder / options["name"], resume=options.get("resume", False)
        )
    except Stopped:
        return


def main() -> None:
    torch.set_num_threads(1)
    for options in json.loads(sys.argv[1]):
        train(Path(sys.argv[2]), options)
    if torch.distributed.is_initialized():
        leave()


if __name__ == "__main__":
    main()
