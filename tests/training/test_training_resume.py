"""Interrupted and resumed equals unbroken, bit for bit; checkpoints are whole or not there; clear errors."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import assert_equal_weights, weights

from unclipped.core.errors import CheckpointError, UnclippedError, UsageError
from unclipped.data.config import AugmentConfig, DataConfig, Geometric, Photometric, SourceConfig
from unclipped.objectives.answer import AnswerObjective
from unclipped.training import checkpoint as checkpoints
from unclipped.training.config import OptimizerConfig, StageConfig, TrainingConfig
from unclipped.training.interrupt import StopRequest, TrainingInterrupted
from unclipped.training.run import train_stages

MakeModel = Callable[..., tuple[Any, Any]]

# Augmentation and dropout: what is drawn at random must come out the same.
DATA = DataConfig(
    sources=(SourceConfig(source="generated:characters", weight=2), SourceConfig(source="generated:shapes")),
    augment=AugmentConfig(steps=(Geometric(), Photometric())),
)
ALL = {"vision": 1e-3, "connector": 1e-3, "text": 1e-3}
STAGES = (
    StageConfig(name="connector", train={"connector": 1e-2}, steps=2, batch_size=2),
    StageConfig(name="all", train=ALL, steps=4, batch_size=4, gradient_accumulation=2, auxiliary={"ctc": 0.3}),
    StageConfig(name="more", train=ALL, steps=2, batch_size=2, auxiliary={"ctc": 0.3}),
)


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process the signal of Ctrl-C after so many optimiser steps of the run."""

    def arrange(steps: int) -> None:
        seen = [0]

        def after_step(self: AnswerObjective) -> None:
            seen[0] += 1
            if seen[0] == steps:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(AnswerObjective, "after_step", after_step)

    return arrange


def run(
    make_vlm: MakeModel, output: Path, training: TrainingConfig, *, resume: bool = False, stages: Any = STAGES
) -> Any:
    model, processor = make_vlm(lm_overrides={"attention_dropout": 0.1})
    train_stages(model, processor, stages, training, DATA, output, resume=resume)
    return model


@pytest.fixture(scope="module")
def unbroken(
    make_vlm: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, torch.Tensor], list[dict[str, Any]]]]:
    """Weights and metrics of the run that nobody interrupted, by optimiser."""

    @lru_cache
    def train(optimizer: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("unbroken")
        return weights(run(make_vlm, folder, settings(optimizer))), rows(folder)

    return train


def settings(optimizer: str) -> TrainingConfig:
    return TrainingConfig(optimizer=OptimizerConfig(name=optimizer), seed=1, log_every_steps=3, threads=1)


def rows(output: Path) -> list[dict[str, Any]]:
    kept = ("stage", "step", "loss", "parts", "learning_rates", "gradient_norm")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in kept} for line in lines]


@pytest.mark.parametrize(
    ("optimizer", "steps", "where"),
    [
        ("muon", (4,), "stage 'all' after step 2"),
        ("adamw", (5,), "stage 'all' after step 3"),
        ("muon", (2,), "before 'all'"),
        ("muon", (3, 2), "stage 'all' after step"),
    ],
)
def test_resumed_equals_unbroken(
    make_vlm: MakeModel,
    tmp_path: Path,
    interrupt_after: Callable[[int], None],
    unbroken: Callable[[str], Any],
    optimizer: str,
    steps: tuple[int, ...],
    where: str,
) -> None:
    training = settings(optimizer)
    for attempt, count in enumerate(steps):
        interrupt_after(count)
        with pytest.raises(TrainingInterrupted, match=f"{where}.*--resume") as stopped:
            run(make_vlm, tmp_path, training, resume=attempt > 0)
        assert stopped.value.exit_code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    resumed = run(make_vlm, tmp_path, training, resume=True)
    expected_weights, expected_rows = unbroken(optimizer)
    assert_equal_weights(resumed, expected_weights)
    assert rows(tmp_path) == expected_rows
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["finished"]
    assert [stage["name"] for stage in record["stages"]] == ["connector", "all", "more"]
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_in_the_last_step_is_heeded_when_the_model_is_saved(
    make_vlm: MakeModel, tmp_path: Path, interrupt_after: Callable[[int], None]
) -> None:
    interrupt_after(2)
    with pytest.raises(TrainingInterrupted, match=r"when training had ended; the model is .*/model\. .*--resume"):
        run(make_vlm, tmp_path, TrainingConfig(), stages=STAGES[:1])
    assert json.loads((tmp_path / "training.json").read_text())["finished"]
    run(make_vlm, tmp_path, TrainingConfig(), stages=STAGES[:1], resume=True)


def test_a_finished_run_is_left_alone(make_vlm: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(make_vlm, tmp_path, TrainingConfig(), stages=STAGES[:1])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    run(make_vlm, tmp_path, TrainingConfig(), stages=STAGES[:1], resume=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert "nothing to resume" in capsys.readouterr().out


def test_other_settings_are_refused(
    make_vlm: MakeModel, tmp_path: Path, interrupt_after: Callable[[int], None]
) -> None:
    interrupt_after(3)
    with pytest.raises(TrainingInterrupted):
        run(make_vlm, tmp_path, TrainingConfig())
    changed = (STAGES[0], STAGES[1].model_copy(update={"batch_size": 8}), STAGES[2])
    with pytest.raises(UsageError, match=r"stages.1.batch_size was 4 when .* and is 8 now"):
        run(make_vlm, tmp_path, TrainingConfig(), stages=changed, resume=True)
    with pytest.raises(UsageError, match=r"run\.seed was 0 when"):
        run(make_vlm, tmp_path, TrainingConfig(seed=5), resume=True)
    changed = (STAGES[0], STAGES[1])  # later stages may be cut or changed, and these settings change no weight
    run(make_vlm, tmp_path, TrainingConfig(log_every_steps=2, threads=1), stages=changed, resume=True)


def test_checkpoints_every_few_steps_keep_the_newest(
    make_vlm: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    original = checkpoints.write_checkpoint

    def spy(folder: Path, **fields: Any) -> Path:
        path = original(folder, **fields)
        written.append((path.name, sorted(p.name for p in folder.iterdir())))
        return path

    monkeypatch.setattr(checkpoints, "write_checkpoint", spy)
    run(make_vlm, tmp_path, TrainingConfig(save_every_steps=1), stages=STAGES[:2])
    assert [name for name, _ in written] == [
        "00-connector-step-00000001",
        "00-connector-done",
        "01-all-step-00000001",
        "01-all-step-00000002",
        "01-all-step-00000003",
    ]
    assert all(present == [name] for name, present in written)


def test_a_failed_write_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"stage_index": 0, "stage": "s", "is_finished": False, "own_random_state": {}, "rank": 0}
    fields |= {"trainer_state_json": "{}"}
    first = checkpoints.write_checkpoint(tmp_path, step=1, state={"a": torch.ones(2)}, **fields)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UnclippedError, match="step-00000002: No space left on device; free space"):
        checkpoints.write_checkpoint(tmp_path, step=2, state={}, **fields)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    position = checkpoints.latest_checkpoint(tmp_path)
    assert position is not None
    assert (position.step, position.folder) == (1, first)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    fields = {"stage_index": 0, "stage": "s", "step": 1, "is_finished": False, "own_random_state": {}, "rank": 0}
    folder = checkpoints.write_checkpoint(tmp_path, state={"a": 1}, trainer_state_json="{}", **fields)
    with pytest.raises(CheckpointError, match=r"written by 1 process\(es\)"):
        checkpoints.read_random_state(folder, rank=1)
    (folder / "state.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read"):
        checkpoints.read_state(folder)
    (folder / "position.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"position\.json: not a checkpoint position"):
        checkpoints.latest_checkpoint(tmp_path)


def test_random_state_round_trip(tmp_path: Path) -> None:
    import random

    import numpy as np

    device = torch.device("cpu")

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    random.gauss(0, 1)
    np.random.standard_normal()
    torch.save(checkpoints.random_state(device), tmp_path / "random-0.pt")
    expected = [draw() for _ in range(3)]
    checkpoints.restore_random_state(checkpoints.read_random_state(tmp_path, 0), device)
    assert [draw() for _ in range(3)] == expected


def test_the_second_signal_acts_as_always() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_frozen_parts_stay_bit_identical(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm()
    before = weights(model)
    train_stages(model, processor, STAGES[:1], TrainingConfig(), DATA, tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".connector." in name for name in changed)
