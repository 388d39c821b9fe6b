"""Run by torchrun in test_captioning_pretraining.py: caption a folder of pairs, once for each of the arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from pair_support import VIT
from torchrun_support import leave

from unclipped.data.config import AugmentConfig, DataConfig, RandomCrop, SourceConfig
from unclipped.objectives.captioning_config import CaptioningConfig
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.training.config import OptimizerConfig, PretrainConfig, TokenizerConfig, TrainingConfig
from unclipped.training.pretrain import pretrain


def config(folder: Path, *, captioning: dict[str, Any] | None = None, **fields: Any) -> PretrainConfig:
    """Tiny captioning of the pairs in `folder`; fields of the training configuration under `training`."""
    given: dict[str, Any] = {
        "shape": VIT,
        "image_size": 16,
        "data": DataConfig(
            sources=(SourceConfig(source=str(folder)),), augment=AugmentConfig(steps=(RandomCrop(minimum_area=0.8),))
        ),
        "tokenizer": TokenizerConfig(vocabulary_size=280),
        "pairs": PairsConfig(context_length=12),
        "captioning": CaptioningConfig(**({"width": 16, "layers": 1, "heads": 2} | (captioning or {}))),
        "steps": 5,
        "batch_size": 4,
        "learning_rate": 3e-3,
    }
    training = {"optimizer": OptimizerConfig(weight_decay=0.1), "log_every_steps": 1, "threads": 1, "device": "cpu"}
    training |= fields.pop("training", {})
    return PretrainConfig(objective="captioning", training=TrainingConfig(**training), **(given | fields))


def main() -> None:
    torch.set_num_threads(1)
    for options in json.loads(sys.argv[1]):
        name = options.pop("name")
        pretrain(config(Path(sys.argv[2]), **options), Path(sys.argv[3]) / name)
    leave()


if __name__ == "__main__":
    main()
