"""Pretraining in phases of growing resolution: what goes on, what changes size, resume, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_support import VIT
from phase_support import LLM, OBJECTIVES, PHASES, kind_of, make_job, tiny
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModel

from unclipped.core.errors import UsageError
from unclipped.encoders.build import load_encoder
from unclipped.training.config import OptimizerConfig, PhaseStage, PretrainConfig
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.pretrain import pretrain
from unclipped.training.record import TrainingResult

THREE = ({"image_size": 32, "steps": 2}, {"image_size": 40, "steps": 2})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_but_the_positions_goes_on_into_a_phase(objective: str, tmp_path: Path) -> None:
    config = tiny(objective, tmp_path)
    job = make_job(config)
    main, phase = config.stages()
    before = {k: v.clone() for k, v in job.make_objective(main, {}).state_dict().items() if torch.is_tensor(v)}
    assert job.make_examples(main).batch([0, 1])[_image(objective)].shape[-1] == 16
    after = job.make_objective(phase, {}).state_dict()
    assert list(after) == list(before)
    changed = {name for name in before if before[name].shape != after[name].shape}
    tables = {name for name in before if name.endswith("position_embeddings")}
    assert changed == tables
    teachers = {name for name in tables if name.startswith("teacher.")}
    assert len(teachers) == (1 if objective == "dinov2" else 0)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in tables)
    assert {tuple(after[name].shape) for name in tables} == {(1, 17, 16)}
    batch = job.make_examples(phase).batch([0, 1])
    assert batch[_image(objective)].shape[-1] == 32
    if objective == "dinov2":
        assert batch["local_crops"].shape[-1] == 16
    # the phase's first draws are those after the main stage's last
    assert batch["sample_ids"] == job.make_examples(main).batch([12, 13])["sample_ids"]


def _image(objective: str) -> str:
    return "global_crops" if objective == "dinov2" else "pixel_values"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_goes_on_and_the_folder_has_the_last_side(objective: str, tmp_path: Path) -> None:
    result = pretrain(tiny(objective, tmp_path), tmp_path / "run")
    assert [entry["name"] for entry in result.record["stages"]] == [objective, f"{objective}-32px"]
    assert result.record["stages"][1]["notes"] == ["images of 32×32 px, 4×4 patches; positions interpolated from 2×2"]
    earlier = tmp_path / "run" / "stages" / f"00-{objective}"
    for folder, side in ((earlier, 16), (result.model_folder, 32)):
        encoder, _ = load_encoder(str(folder), baseline=True)
        assert encoder.spec.image_size == (side, side)
        stated = json.loads((folder / "preprocessor_config.json").read_text())
        assert stated["size"] == {"height": side, "width": side}
        assert AutoModel.from_pretrained(folder).config.image_size == side
    first, last = (load_file(folder / "model.safetensors") for folder in (earlier, result.model_folder))
    name = next(name for name in first if name.endswith("layernorm_before.weight"))
    assert not torch.equal(first[name], last[name])  # it was trained
    torch.testing.assert_close(first[name], last[name], atol=0.05, rtol=0)  # from the same weights
    statistics = [json.loads((f / "preprocessor_config.json").read_text())["image_mean"]
                  for f in (earlier, result.model_folder)]  # fmt: skip
    assert statistics[0] == statistics[1]
    assert {row["stage"] for row in rows(tmp_path / "run")} == {objective, f"{objective}-32px"}
    drawn = sorted(path.parent.name for path in (tmp_path / "run" / "pictures").rglob("views.png"))
    assert drawn == [f"00-{objective}", f"01-{objective}-32px"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_encoder_without_a_table_gets_larger_grids(objective: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"distill": {"teacher": str(tmp_path / "teacher"), "resize_grid": True}}
    config = tiny(objective, tmp_path, shape=LLM, **(fields if objective == "distill" else {}))
    result = pretrain(config, tmp_path / "run")
    assert result.record["stages"][1]["notes"] == ["images of 32×32 px, 4×4 patches"]
    stated = json.loads((result.model_folder / "preprocessor_config.json").read_text())
    assert stated["size"] == {"height": 32, "width": 32}
    before, after = result.record["stages"]
    assert before["parameters"] == after["parameters"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PretrainConfig, TrainingResult]]:
    """For each objective the configuration of three stages and its unbroken run, made once."""
    folder, made = tmp_path_factory.mktemp("unbroken"), {}

    def run(objective: str) -> tuple[PretrainConfig, TrainingResult]:
        if objective not in made:
            config = tiny(objective, folder, phases=THREE)
            made[objective] = config, pretrain(config, folder / objective)
        return made[objective]

    return run


@pytest.mark.parametrize(
    ("objective", "steps"),
    [("dinov2", 3), ("dinov2", 4), ("dinov2", 5), ("dinov2", 6), ("masked_autoencoder", 5), ("masked_autoencoder", 6),
     ("distill", 5), ("distill", 6), ("coca", 5), ("coca", 6)],
)  # fmt: skip
def test_an_interrupted_run_resumes_to_equal_files(
    objective: str, steps: int, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many steps of 3 + 2 + 2: 3 and 5 lie between two stages, 4 and 6 in the middle of one."""
    config, whole = unbroken(objective)
    kind = kind_of(objective)
    after_step, done = kind.after_step, []

    def stop(self: Any) -> None:
        after_step(self)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(kind, "after_step", stop)
    where = "after" if steps in (3, 5) else "in"
    with pytest.raises(TrainingInterrupted, match=f"interrupted {where} stage '{objective}"):
        pretrain(config, tmp_path / "parts")
    monkeypatch.undo()
    parts = pretrain(config, tmp_path / "parts", resume=True)
    names = [path.relative_to(whole.output) for path in whole.output.rglob("*.safetensors")]
    assert len(names) >= 3
    for name in names:
        assert (whole.output / name).read_bytes() == (parts.output / name).read_bytes(), name
    assert [row["loss"] for row in rows(parts.output)] == [row["loss"] for row in rows(whole.output)]
    notes = [[entry.get("notes") for entry in run.record["stages"]] for run in (whole, parts)]
    assert notes[0] == notes[1]


def test_a_resumed_run_must_have_the_same_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind_of("dinov2")
    after_step, done = kind.after_step, []

    def stop(self: Any) -> None:
        after_step(self)
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(kind, "after_step", stop)
    with pytest.raises(TrainingInterrupted):
        pretrain(tiny("dinov2", tmp_path), tmp_path / "run")
    monkeypatch.undo()
    other = tiny("dinov2", tmp_path, phases=({**PHASES[0], "image_size": 40},))
    with pytest.raises(UsageError, match=r"--resume: stages\.1\.(name|image_size) was"):
        pretrain(other, tmp_path / "run", resume=True)


def test_schedules_of_dinov2_run_again_in_a_phase_compressed_into_it(tmp_path: Path) -> None:
    config = tiny(
        "dinov2", tmp_path, steps=40, warmup_steps=10, phases=({"image_size": 32, "steps": 20},),
        dinov2={"local_crops": 1, "local_size": 8, "prototypes": 12, "head_hidden": 16, "bottleneck": 8,
                "teacher_temperature": (0.04, 0.08), "teacher_temperature_steps": 20, "frozen_prototype_steps": 4,
                "teacher_momentum": (0.9, 1.0)},
    )  # fmt: skip
    job = make_job(config)
    main, phase = config.stages()
    assert phase.warmup_steps == 5
    objective = job.make_objective(main, {})
    objective.step.fill_(40)
    assert objective._temperature() == pytest.approx(0.08)
    job.make_objective(phase, {})
    assert objective._temperature() == pytest.approx(0.04)
    objective.step.fill_(5)
    assert objective._temperature() == pytest.approx(0.06)
    assert objective._in_stage(4) == 2
    student, teacher = (next(side.parameters()) for side in (objective.student, objective.teacher))
    with torch.no_grad():
        student.fill_(1.0)
        teacher.fill_(0.0)
    objective.step.fill_(10)  # half of the phase: momentum half-way from 0.9 to 1
    objective.after_step()
    assert teacher.detach().flatten()[0].item() == pytest.approx(0.05)


def test_a_phase_takes_from_the_main_stage_what_it_does_not_say(tmp_path: Path) -> None:
    muon = OptimizerConfig(name="muon", muon_learning_rate=0.02)
    config = tiny(
        "dinov2", tmp_path, learning_rate=1e-3, steps=10, warmup_steps=3, schedule="linear", clip_norm=3.0,
        training={"optimizer": muon}, phases=({"image_size": 32, "steps": 5},
        {"image_size": 48, "steps": 4, "batch_size": 2, "learning_rate": 1e-4, "warmup_steps": 0, "local_size": 24}),
    )  # fmt: skip
    main, first, second = config.stages()
    assert isinstance(first, PhaseStage)
    assert (first.train, first.batch_size, first.warmup_steps, first.schedule) == (main.train, 4, 1, "linear")
    assert (first.clip_norm, first.optimizer) == (3.0, None)
    assert isinstance(second, PhaseStage)
    assert (second.train, second.batch_size, second.warmup_steps) == ({"vision": 1e-4}, 2, 0)
    assert second.optimizer is not None
    assert second.optimizer.muon_learning_rate == pytest.approx(0.002)  # or the matrices would go on at full speed
    job = make_job(config)
    assert job.make_examples(second).batch([0])["local_crops"].shape[-1] == 24
    assert job.make_examples(second).first == 10 * 4 + 5 * 4


def test_the_teacher_of_a_distillation_sees_larger_images_too(tmp_path: Path) -> None:
    config = tiny("distill", tmp_path)
    job = make_job(config)
    objective = job.make_objective(config.stages()[0], {})
    assert (objective.teacher_size, objective.grid) == ((24, 24), (2, 2))
    objective = job.make_objective(config.stages()[1], {})
    assert (objective.teacher_size, objective.teacher_grid, objective.grid) == ((48, 48), (4, 4), (4, 4))
    assert objective.target(torch.randn(1, 3, 32, 32)).patches.shape == (1, 16, 24)


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("dinov2", {"phases": ({"image_size": 36, "steps": 1},)}, r"phases\.0\.image_size: 36 px are no multiple.*8×8"),
        ("coca", {"phases": ({"image_size": 36, "steps": 1},)}, r"phases\.0\.image_size: 36 px are no multiple.*8×8"),
        (
            "sigmoid",
            {"shape": VIT | {"image_size": 48}, "image_size": None},
            r"phases\.0\.image_size: expected more than the 48 px of the main stage, found 32",
        ),
        ("dinov2", {"phases": ({**PHASES[0], "local_size": 12},)}, r"phases\.0\.local_size: local crops of 12 px"),
        ("dinov2", {"phases": ({**PHASES[0], "batch_size": 1},)}, r"batch_size: koleo needs at least two images"),
        ("contrastive", {"phases": ({**PHASES[0], "batch_size": 1},)}, r"batch_size: contrastive compares at least"),
        ("distill", {"phases": ({"image_size": 40, "steps": 1},), "shape": VIT | {"patch_size": 4}}, "its grid is"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_are_refused_before_training(
    objective: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        pretrain(tiny(objective, tmp_path, **fields), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("language_model", {}, r"phases: language_model trains no encoder"),
        ("language_model", {"phases": (), "init": "x"}, r"init: language_model trains no encoder"),
        ("coca", {"phases": ({"image_size": 16, "steps": 1},)}, r"phases\.0\.image_size: expected more than the 16 px"),
        ("coca", {"phases": ({"image_size": 8, "steps": 1},)}, r"phases\.0\.image_size: expected more than the 16 px"),
        ("coca", {"phases": (*THREE, THREE[1])}, r"phases\.2\.image_size: expected more than the 40 px"),
        ("coca", {"phases": ({**PHASES[0], "local_size": 8},)}, r"phases\.0\.local_size: coca has no local crops"),
        ("coca", {"phases": ({**PHASES[0], "warmup_steps": 3},)}, r"stage 'coca-32px': warmup_steps \(3\)"),
        ("coca", {"phases": ({**PHASES[0], "gradient_accumulation": 3},)}, r"stage 'coca-32px': batch_size \(4\)"),
        ("coca", {"phases": ({"image_size": 32},)}, r"steps"),
    ],
)
def test_phases_that_cannot_be_are_refused_in_the_recipe(
    objective: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(objective, tmp_path, **fields)
