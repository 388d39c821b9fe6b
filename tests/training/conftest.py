"""Small trainings: a language model on seeded random tokens, and a vision-language model on generated characters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import RandomTokens, small_language_model

from support.tiny_models import tiny_vlm
from unclipped.objectives.language_model import LanguageModelObjective
from unclipped.training.batches import StageBatches
from unclipped.training.config import OptimizerConfig, StageConfig, TrainingConfig
from unclipped.training.interrupt import StopRequest
from unclipped.training.progress import Reporter
from unclipped.training.trainer import UnclippedTrainer


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., UnclippedTrainer]:
    """Build a trainer of a small language model; `objective` and `examples` replace the parts."""

    def make(
        stage: StageConfig,
        *,
        optimizer: str = "adamw",
        objective: Any = None,
        examples: Any = None,
        stop: StopRequest | None = None,
        **training: Any,
    ) -> UnclippedTrainer:
        config = TrainingConfig(optimizer=OptimizerConfig(name=optimizer), **training)
        return UnclippedTrainer(
            objective or LanguageModelObjective(small_language_model()),
            stage,
            config,
            StageBatches(examples or RandomTokens(), stage, seed=0),
            device=torch.device("cpu"),
            autocast=None,
            folder=tmp_path / "checkpoints",
            stage_index=0,
            seed=0,
            reporter=Reporter(tmp_path / "metrics.jsonl"),
            stop=stop or StopRequest(),
        )

    return make


@pytest.fixture(scope="session")
def make_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """A fresh tiny vision-language model and its processor; the same weights each time."""

    def make(**options: Any) -> tuple[Any, Any]:
        model, processor, _ = tiny_vlm(tmp_path_factory.mktemp("vlm"), **options)
        return model, processor

    return make
