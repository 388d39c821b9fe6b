"""Distillation end to end: the run, what the student declares, resume, and what it refuses."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from unclipped.core.errors import UnclippedError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.encoders.build import load_encoder
from unclipped.encoders.spec import declare_objective
from unclipped.images.config import ImageRule
from unclipped.objectives.distill import DistillObjective
from unclipped.objectives.distill_config import DistillConfig
from unclipped.objectives.trunk import build_trunk, save_trunk
from unclipped.training.config import PretrainConfig, TrainingConfig
from unclipped.training.distill_pretraining import distill_job
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.pretrain import pretrain

VIT = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def teacher(folder: Path, *, declared: Any = "self_supervised", side: int = 48, seed: int = 7) -> str:
    torch.manual_seed(seed)
    trunk = build_trunk(VIT | {"hidden_size": 24, "patch_size": 12}, image_size=side)
    declare_objective(trunk.encoder.model.config, declared)
    rule = ImageRule(rule="squash", size=(side, side), patch_size=(12, 12), mean=(0.2, 0.5, 0.4), std=(0.3, 0.2, 0.5))
    save_trunk(trunk, folder, rule)
    return str(folder)


def distill(source: str, **fields: Any) -> PretrainConfig:
    given = {
        "shape": VIT,
        "image_size": 32,
        "data": DataConfig(sources=(SourceConfig(source="generated:shapes"),)),
        "distill": DistillConfig(teacher=source, **fields.pop("distill", {})),
        "steps": 5,
        "batch_size": 4,
        "training": TrainingConfig(log_every_steps=2, threads=1, device="cpu"),
    }
    return PretrainConfig(objective="distill", **(given | fields))


def test_training_lowers_the_loss_and_the_student_loads(tmp_path: Path) -> None:
    config = distill(teacher(tmp_path / "teacher"), steps=40, learning_rate=5e-3, gradient_accumulation=2)
    job = distill_job(config)
    batch = job.make_examples(config.stage()).batch(range(8))
    before = job.make_objective(config.stage(), {})(**batch)
    assert set(before["parts"]) == {"features", "direction", "amplitude", "relation", "pooled"}
    result = pretrain(config, tmp_path / "run")
    assert result.record["stages"][0]["final_loss"] < 0.7 * before["loss"].item()
    encoder, _ = load_encoder(str(result.model_folder))
    assert encoder.spec.objective == "self_supervised"
    assert torch.isfinite(encoder(torch.randn(16, 192), torch.tensor([[1, 4, 4]]))).all()


def test_the_teacher_sees_its_own_size_and_normalisation_and_stays_frozen(tmp_path: Path) -> None:
    config = distill(teacher(tmp_path / "teacher"))
    job = distill_job(config)
    objective: Any = job.make_objective(config.stage(), {})
    white = ((torch.ones(1, 3, 32, 32) - objective.statistics[0]) / objective.statistics[1]).float()
    encoder, _ = load_encoder(str(tmp_path / "teacher"))
    mean, std = (torch.tensor(values).repeat_interleave(144) for values in (encoder.spec.mean, encoder.spec.std))
    expected = encoder(((1 - mean) / std).repeat(16, 1), torch.tensor([[1, 4, 4]]))
    torch.testing.assert_close(objective.target(white).patches[0], expected, atol=1e-4, rtol=1e-4)
    objective.train()
    assert not objective._teacher[0].training
    assert not any(p.requires_grad for p in objective._teacher[0].parameters())
    assert not any("_teacher" in name for name in objective.state_dict())
    assert sum(name.startswith("teacher") for name in objective.state_dict()) == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(objective(pixel_values=white)["loss"])
    with torch.no_grad():
        assert objective.health({"pixel_values": white.repeat(4, 1, 1, 1)})["images"] == 4


def test_the_student_of_a_baseline_is_a_baseline(tmp_path: Path) -> None:
    source = teacher(tmp_path / "teacher", declared="contrastive")
    with pytest.raises(UsageError, match=r"distill\.teacher: .*contrastive.*distill\.baseline"):
        pretrain(distill(source), tmp_path / "refused")
    result = pretrain(distill(source, distill={"baseline": True}), tmp_path / "run")
    with pytest.raises(UsageError, match="contrastive"):
        load_encoder(str(result.model_folder))
    assert load_encoder(str(result.model_folder), baseline=True)[0].spec.objective == "contrastive"


def test_resume_is_exact_and_refuses_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = distill(teacher(tmp_path / "teacher"))
    whole = pretrain(config, tmp_path / "whole")
    calls = []

    def stop_in_step_three(self: DistillObjective) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(DistillObjective, "after_step", stop_in_step_three)
    with pytest.raises(TrainingInterrupted, match="step 3 of 5"):
        pretrain(config, tmp_path / "parts")
    monkeypatch.undo()
    (tmp_path / "teacher").rename(tmp_path / "kept")
    teacher(tmp_path / "teacher", seed=8)
    with pytest.raises(UsageError, match=r"files changed.*teacher: model\.safetensors has another content"):
        pretrain(config, tmp_path / "parts", resume=True)
    (tmp_path / "teacher").rename(tmp_path / "other")
    (tmp_path / "kept").rename(tmp_path / "teacher")
    parts = pretrain(config, tmp_path / "parts", resume=True)
    one, other = (load_encoder(str(result.model_folder))[0].state_dict() for result in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_grid_that_differs_is_refused_or_resized(tmp_path: Path) -> None:
    source = teacher(tmp_path / "teacher", side=72)
    with pytest.raises(UsageError, match=r"grid is 6×6 patches, the student's 4×4; .*resize_grid"):
        pretrain(distill(source), tmp_path / "refused")
    assert pretrain(distill(source, distill={"resize_grid": True}), tmp_path / "run").record["finished"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UnclippedError, match="nowhere"):
        pretrain(distill(str(tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(UsageError, match=r"distill\.teacher"):
        pretrain(distill("x", distill={}).model_copy(update={"distill": None}), tmp_path / "run")
    zero = dict.fromkeys(("features", "direction", "amplitude", "relation", "pooled"), 0.0)
    with pytest.raises(ValidationError, match="all weights are zero"):
        DistillConfig(teacher="x", **zero)
