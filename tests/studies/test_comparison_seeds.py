"""Several seeds of a comparison: what a seed changes, how figures are summed up, and the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparison_support import comparison
from pydantic import ValidationError

from unclipped.recipes.loading import read_recipe
from unclipped.recipes.schema import ComparisonRecipe
from unclipped.recipes.validation import validate
from unclipped.studies.comparison_config import ComparisonConfig
from unclipped.studies.comparison_report import findings, limits
from unclipped.studies.comparison_seeds import over_seeds, run_seeds

PROBE = {
    "data": {"source": "generated:shapes", "train_limit": 24, "test_limit": 12},
    "probes": ["knn"], "knn": {"k": [3]}, "bootstrap_samples": 100,
}  # fmt: skip


def test_a_seed_draws_every_training_and_the_random_weights_and_changes_nothing_else() -> None:
    recipe = validate(read_recipe("clothing-objectives"), ComparisonRecipe, "clothing-objectives")
    changed = recipe.with_seed(7)
    assert isinstance(changed, ComparisonRecipe)
    assert all(changed.pretraining(arm, Path()).training.seed == 7 for arm in recipe.arms)
    assert changed.experiment("e", is_baseline=False).training.seed == 7
    assert changed.probe("category", "e", is_baseline=False).random_seed == 7
    assert changed.with_seed(0).model_dump() == recipe.with_seed(0).model_dump()


def test_a_seed_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"the same seed twice in \[1, 1\]"):
        ComparisonConfig(**comparison(seeds=[1, 1]))


def test_figures_are_means_with_the_lowest_and_highest_seed_and_differences_count_seeds() -> None:
    def run(value: float, low: float) -> dict[str, Any]:
        figure = {"value": value, "low": 0.0, "high": 1.0, "count": 5}
        difference = {"value": value, "low": low, "high": 1.0}
        return {
            "pretraining": {"a": {"seconds": 2.0, "report": "encoders/a/report.html", "warnings": ["w"]}},
            "probes": {"p": {"a": {"metric": "accuracy", "encoder": figure, "minus_random": None}}},
            "vlm": {"a": {"c": {"accuracy": value, "low": 0.0, "high": 1.0, "count": 5}}},
            "vlm_overall": {"t": {"a": {"accuracy": value, "low": 0.0, "high": 1.0, "count": 5}}},
            "vlm_minus_random": {"a": {"t": difference}},
            "vlm_minus_blind": {"a": {"t": difference}},
        }  # fmt: skip

    found = over_seeds({3: run(0.2, 0.1), 5: run(0.6, -0.1)})
    assert found["seeds"] == [3, 5]
    assert found["pretraining"]["a"]["seconds"] == 4.0
    assert found["pretraining"]["a"]["warnings"] == ["seed 3: w", "seed 5: w"]
    expected = {"value": pytest.approx(0.4), "low": 0.2, "high": 0.6, "values": [0.2, 0.6], "count": 5}
    assert found["probes"]["p"]["a"]["encoder"] == expected
    assert found["vlm_overall"]["t"]["a"]["accuracy"] == pytest.approx(0.4)
    assert found["vlm_minus_random"]["a"]["t"]["above"] == 1
    assert "trained models on t: no arm is above a random encoder" in findings(found)
    both = over_seeds({3: run(0.2, 0.1), 5: run(0.6, 0.3)})
    assert "2 seeds were run" in limits(both)
    assert "trained models on t: all arms are above a random encoder" in findings(both)


def test_two_seeds_are_two_comparisons_and_one_page(tmp_path: Path) -> None:
    fields = comparison(probes={"figure": PROBE}, seeds=[1, 2]) | {
        "arms": {"contrastive": {"objective": "contrastive"}}
    }
    config = ComparisonConfig(**fields)
    results = run_seeds(config, tmp_path, say=lambda line: None)
    single = [json.loads((tmp_path / f"seed-{seed}" / "comparison.json").read_text("utf-8")) for seed in (1, 2)]
    losses = [run["pretraining"]["contrastive"]["loss"] for run in single]
    assert losses[0] != losses[1]
    row = results["probes"]["figure, knn"]["contrastive"]["encoder"]
    assert row["values"] == [run["probes"]["figure, knn"]["contrastive"]["encoder"]["accuracy"] for run in single]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in (
        "in each of 2 seeds",
        "mean [lowest, highest seed]",
        "seed-2/report.html",
        "seed-1/encoders/contrastive/report.html",
    ):
        assert part in page, part
    again = run_seeds(config, tmp_path, resume=True, say=lambda line: None)
    assert json.dumps(again) == json.dumps(results)
