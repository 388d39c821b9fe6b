"""The trainer's measurements of health: when they are taken, what is written and said, and that they leave no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_support import assert_equal_weights

from unclipped.core.errors import UnclippedError
from unclipped.objectives.base import Objective
from unclipped.objectives.health import feature_health
from unclipped.training.config import StageConfig
from unclipped.training.trainer import UnclippedTrainer

Make = Callable[..., UnclippedTrainer]
STAGE = StageConfig(name="vision", train={"text": 1e-2}, steps=25, batch_size=4)


class Noisy(Objective):
    """A net with dropout and batch statistics, whose features have collapsed from the start when `flat`."""

    needs = "images"

    def __init__(self, *, flat: bool = False, measures: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 6))
        self.flat, self.measures = flat, measures
        self.seen: list[tuple[bool, bool]] = []

    def part_of(self, name: str) -> Any:
        return "text"

    def num_tokens(self, batch: dict[str, Any]) -> int:
        return batch["input_ids"].numel()

    def forward(self, *, counts: Any = None, input_ids: torch.Tensor, **unused: Any) -> dict[str, Any]:
        loss = self.model(input_ids.float() / 40).square().mean()
        return {"loss": loss, "parts": {"square": loss.detach()}}

    def health(self, batch: dict[str, Any]) -> dict[str, float]:
        if not self.measures:
            return super().health(batch)
        self.seen.append((self.model.training, torch.is_grad_enabled()))
        features = self.model(batch["input_ids"].float() / 40) + torch.randn(())
        return feature_health(torch.zeros_like(features) if self.flat else features)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_health_stands_in_the_first_every_tenth_and_the_last_line(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(STAGE, objective=Noisy(), log_every_steps=2)
    trainer.train()
    measured = {row["step"]: row["health"] for row in rows(tmp_path) if "health" in row}
    assert list(measured) == [2, 22, 25]
    assert all(set(health) == {"rank", "spread", "images"} and health["images"] == 4 for health in measured.values())
    assert trainer.objective.seen == [(False, False)] * 3
    assert not any("warnings" in row for row in rows(tmp_path))


def test_measuring_changes_no_weight(make_trainer: Make) -> None:
    runs = []
    for measures in (True, False):
        trainer = make_trainer(STAGE, objective=Noisy(measures=measures), log_every_steps=1)
        torch.manual_seed(5)
        trainer.train()
        runs.append((trainer.objective, torch.get_rng_state()))
    (measured, after_measured), (plain, after_plain) = runs
    assert len(measured.seen) == 4
    assert_equal_weights(measured, plain)
    assert torch.equal(after_measured, after_plain)


def test_a_collapse_is_said_and_written_once(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(STAGE, objective=Noisy(flat=True), log_every_steps=1).train()
    warned = {row["step"]: row["warnings"] for row in rows(tmp_path) if "warnings" in row}
    assert list(warned) == [11]  # measured at 1, 11, 21 and 25; the first alone may be chance
    assert "features are nearly constant" in warned[11][0]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said == [f"warning: stage 'vision', step 11: {warned[11][0]}"]


def test_objectives_without_health_write_none(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(StageConfig(train={"text": 1e-3}, steps=2, batch_size=4), log_every_steps=1).train()
    assert not any("health" in row or "warnings" in row for row in rows(tmp_path))


def test_features_that_are_not_finite_stop_the_run(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noisy, "health", lambda self, batch: feature_health(torch.full((4, 2), torch.nan)))
    with pytest.raises(UnclippedError, match="health of the encoder: 8 of 8 values are not finite"):
        make_trainer(STAGE, objective=Noisy(), log_every_steps=1).train()
