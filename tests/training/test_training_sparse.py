"""Training under a pattern: a full one changes nothing, dense steps follow the seed, resume does not lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import weights

from unclipped.attention.config import SparseTrainingConfig
from unclipped.core.errors import UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.objectives.answer import AnswerObjective
from unclipped.training.config import StageConfig, TrainingConfig
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.run import train_stages
from unclipped.training.sparse import SparseSteps

MakeModel = Callable[..., tuple[Any, Any]]
DATA = DataConfig(sources=(SourceConfig(source="generated:characters"),))
TRAINING = TrainingConfig(log_every_steps=1, threads=1)
SMALL: dict[str, Any] = {"fallback": "never", "key_block": 4, "query_block": 8}


def stage(pattern: str | None, **fields: Any) -> StageConfig:
    sparse = None if pattern is None else SparseTrainingConfig(pattern=pattern, **SMALL, **fields)
    parts: Any = {"vision": 1e-3, "connector": 1e-3, "text": 1e-3}
    return StageConfig(name="all", train=parts, steps=4, batch_size=2, sparse=sparse)


def run(make_vlm: MakeModel, stages: StageConfig, output: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    model, processor = make_vlm()
    result = train_stages(model, processor, [stages], TRAINING, DATA, output, **options)
    return model, result.record["stages"][0]


def test_a_full_pattern_trains_as_dense_does(make_vlm: MakeModel, tmp_path: Path) -> None:
    dense, entry = run(make_vlm, stage(None), tmp_path / "dense")
    assert "sparse" not in entry
    full, entry = run(make_vlm, stage("full"), tmp_path / "full")
    assert entry["sparse"]["last_prefill"]["sparse_layers"] == 2
    for name, value in weights(full).items():
        assert torch.allclose(value, weights(dense)[name], atol=1e-4), name
    narrow, entry = run(make_vlm, stage("sink(4)"), tmp_path / "narrow")
    assert entry["sparse"]["last_prefill"]["density"] < 0.9
    assert any(not torch.allclose(v, weights(dense)[name], atol=1e-4) for name, v in weights(narrow).items())
    assert narrow.config.get_text_config()._attn_implementation == "sdpa"  # as before


def test_resumed_equals_unbroken(make_vlm: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    mixed = stage("topk(1)", dense_share=0.5)
    unbroken, _ = run(make_vlm, mixed, tmp_path / "unbroken")
    steps = [0]

    def after_step(self: AnswerObjective) -> None:
        steps[0] += 1
        if steps[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AnswerObjective, "after_step", after_step)
    with pytest.raises(TrainingInterrupted):
        run(make_vlm, mixed, tmp_path / "broken")
    resumed, _ = run(make_vlm, mixed, tmp_path / "broken", resume=True)
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(unbroken)[name]), name


def test_dense_steps_are_drawn_by_the_seed(make_vlm: MakeModel) -> None:
    model, _ = make_vlm()
    config = SparseTrainingConfig(pattern="full", dense_share=0.3)
    drawn = []
    with SparseSteps(model, config, seed=5) as steps:
        assert steps.hold is not None
        for step in range(400):
            steps.start_step(step)
            drawn.append(steps.hold.state.is_paused)
        steps.start_step(17)
        assert steps.hold.state.is_paused == drawn[17]
    assert 0.2 < sum(drawn) / 400 < 0.4


def test_compiled_blocks_are_refused(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm()
    training = TRAINING.model_copy(update={"compile": True})
    with pytest.raises(UsageError, match=r"sparse and training\.compile do not go together"):
        train_stages(model, processor, [stage("full")], training, DATA, tmp_path)
