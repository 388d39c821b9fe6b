"""The trainer against a hand-written loop: equal weights, equal metrics, accumulation, errors that name the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_support import RandomTokens, assert_equal_weights, small_language_model, weights

from unclipped.core.errors import UnclippedError, UsageError
from unclipped.objectives.base import Objective
from unclipped.objectives.language_model import LanguageModelObjective
from unclipped.training.checkpoint import read_state
from unclipped.training.config import OptimizerConfig, StageConfig
from unclipped.training.optim import build_optimizer, build_scheduler
from unclipped.training.trainer import UnclippedTrainer

Make = Callable[..., UnclippedTrainer]


def by_hand(stage: StageConfig, optimizer_name: str) -> tuple[nn.Module, list[float], list[float]]:
    """(model, loss of each step, gradient norm of each step) of the loop that one would write on a page."""
    objective = LanguageModelObjective(small_language_model())
    optimizer = build_optimizer(objective, stage, OptimizerConfig(name=optimizer_name), objective.part_of)
    scheduler = build_scheduler(optimizer, stage)
    losses, norms = [], []
    for step in range(stage.steps):
        batch = RandomTokens().batch(range(step * stage.batch_size, (step + 1) * stage.batch_size))
        loss = objective(**batch)["loss"]
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(objective.parameters(), stage.clip_norm or float("inf"))))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return objective.model, losses, norms


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_equals_a_hand_written_loop(make_trainer: Make, tmp_path: Path, optimizer: str) -> None:
    stage = StageConfig(train={"text": 1e-2}, steps=6, batch_size=8, warmup_steps=2, clip_norm=0.5)
    trainer = make_trainer(stage, optimizer=optimizer, log_every_steps=2)
    trainer.train()
    model, losses, norms = by_hand(stage, optimizer)
    assert_equal_weights(trainer.objective.model, model)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["loss"] for row in rows] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)])
    assert [row["gradient_norm"] for row in rows] == pytest.approx([sum(norms[i : i + 2]) / 2 for i in (0, 2, 4)])
    assert rows[0]["parts"] == pytest.approx({"next_token": rows[0]["loss"]})
    assert rows[0]["learning_rates"]["text"] == pytest.approx(1e-2 * 2 / 3)
    assert all(row["samples_per_second"] > 0 and row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(make_trainer: Make, accumulation: int) -> None:
    # Rows differ in the number of supervised tokens, so a mean of micro-batch means would be another loss.
    stage = StageConfig(train={"text": 1e-3}, steps=3, batch_size=8)
    whole = make_trainer(stage, log_every_steps=1)
    whole.train()
    parted = make_trainer(stage.model_copy(update={"gradient_accumulation": accumulation}), log_every_steps=1)
    parted.train()
    for name, value in weights(whole.objective).items():
        torch.testing.assert_close(parted.objective.state_dict()[name], value, atol=2e-6, rtol=1e-4)
    assert parted.last_loss == pytest.approx(whole.last_loss, rel=1e-6)


class MeanObjective(Objective):
    """A loss that counts nothing: the mean square of a linear map."""

    needs = "images"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(12, 1)
        self.steps_seen = 0

    def part_of(self, name: str) -> Any:
        return "text"

    def num_tokens(self, batch: dict[str, Any]) -> int:
        return batch["input_ids"].numel()

    def forward(self, *, counts: Any = None, input_ids: torch.Tensor, **unused: Any) -> dict[str, Any]:
        assert counts is None
        loss = self.model(input_ids.float() / 40).square().mean()
        return {"loss": loss, "parts": {"square": loss.detach()}}

    def after_step(self) -> None:
        self.steps_seen += 1


def test_objectives_that_count_nothing_are_averaged(make_trainer: Make) -> None:
    stage = StageConfig(train={"text": 1e-2}, steps=3, batch_size=8)
    whole = make_trainer(stage, objective=MeanObjective(), log_every_steps=1)
    whole.train()
    parted = make_trainer(
        stage.model_copy(update={"gradient_accumulation": 4}), objective=MeanObjective(), log_every_steps=1
    )
    parted.train()
    torch.testing.assert_close(parted.objective.model.weight, whole.objective.model.weight)
    assert parted.last_loss == pytest.approx(whole.last_loss, rel=1e-5)
    assert whole.objective.steps_seen == 3


class Poisoned(LanguageModelObjective):
    """Gives NaN from a sample on."""

    def forward(self, **batch: Any) -> dict[str, Any]:
        outputs = super().forward(**batch)
        if int(batch["input_ids"].sum()) == int(RandomTokens().batch([8, 9, 10, 11])["input_ids"].sum()):
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs


def test_a_loss_that_is_not_finite_names_step_and_samples(make_trainer: Make) -> None:
    stage = StageConfig(name="joint", train={"text": 1e-3}, steps=6, batch_size=4)
    trainer = make_trainer(stage, objective=Poisoned(small_language_model()), log_every_steps=6)
    with pytest.raises(UnclippedError, match="stage 'joint', step 3: loss is nan; samples of the batch: sample-8, sa"):
        trainer.train()


def test_the_state_before_a_loss_that_is_not_finite_is_saved(make_trainer: Make) -> None:
    stage = StageConfig(name="joint", train={"text": 1e-3}, steps=6, schedule="constant", batch_size=4)
    poisoned = make_trainer(stage, objective=Poisoned(small_language_model()), log_every_steps=6)
    with pytest.raises(UnclippedError, match=r"saved the state before this step: .*step-00000002") as caught:
        poisoned.train()
    saved = read_state(Path(str(caught.value).rsplit(": ", maxsplit=1)[1]))
    two_steps = make_trainer(stage.model_copy(update={"steps": 2}))
    two_steps.train()
    expected = two_steps.objective.state_dict()
    assert all(torch.equal(value, saved["objective"][name]) for name, value in expected.items())
    assert all(torch.isfinite(value).all() for value in saved["window"]["sums"].values())


def test_nothing_to_learn_is_an_error(make_trainer: Make) -> None:
    class Detached(LanguageModelObjective):
        def forward(self, **batch: Any) -> dict[str, Any]:
            outputs = super().forward(**batch)
            return outputs | {"loss": outputs["loss"].detach()}

    trainer = make_trainer(
        StageConfig(train={"text": 1e-3}, steps=2, batch_size=4), objective=Detached(small_language_model())
    )
    with pytest.raises(UsageError, match="does not depend on the trained parts"):
        trainer.train()


def test_workers_change_nothing(make_trainer: Make) -> None:
    stage = StageConfig(train={"text": 1e-2}, steps=3, batch_size=4)
    plain, forked = make_trainer(stage), make_trainer(stage, workers=1)
    plain.train()
    forked.train()
    assert_equal_weights(plain.objective, forked.objective)
