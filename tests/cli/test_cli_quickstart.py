"""The quickstart from end to end with a handful of steps, and how minutes become steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.cli.main import main
from unclipped.cli.quickstart_run import seconds_per_step, with_steps
from unclipped.recipes.schema import TrainRecipe
from unclipped.recipes.validation import load_recipe

pytestmark = pytest.mark.slow

FEW = [
    "language_model.steps=3",
    "language_model.warmup_steps=1",
    "language_model.held_out_blocks=4",
    "stages.numbers.steps=3",
    "stages.numbers.warmup_steps=1",
    "stages.words.steps=2",
    "stages.all.steps=2",
    "held_out_blocks=4",
    "evaluation.tasks.0.limit=40",
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["unclipped", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, "quickstart", *FEW, "--output", str(folder))
    return folder


def test_a_run_leaves_report_figures_recipe_and_model(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["model", "random_encoder", "blind"]
    for rows in results.values():
        assert set(rows) == {"read_number", "read_text", "colour", "count"}
    page = (finished / "report.html").read_text()
    for words in ("Unclipped quickstart", "No word of the test split", "unclipped chat", "<svg", "data:image/png"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ), "the page must stand alone"
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert [stage["steps"] for stage in recipe["stages"]] == [3, 2, 2]
    assert (finished / "environment.json").is_file()


def test_the_model_answers_in_chat(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "chat", str(finished / "model"), str(finished / "examples" / "1.png"), "-q", "number?")
    said = capsys.readouterr()
    assert said.out.endswith("\n")  # after a handful of steps the answer itself may be empty
    assert not said.err


def test_resuming_a_finished_run_changes_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "model" / "model.safetensors").read_bytes()
    run(monkeypatch, "quickstart", *FEW, "--output", str(finished), "--resume")
    assert (finished / "model" / "model.safetensors").read_bytes() == before


def test_the_pace_is_measured_for_each_arm(finished: Path) -> None:
    config = load_recipe(str(finished / "recipe.yaml"), TrainRecipe)
    paces = seconds_per_step(config, finished)
    assert len(paces) == 3
    assert all(pace > 0 for pace in paces)


@settings(max_examples=50, deadline=None)
@given(total=st.integers(60, 100_000))
def test_stages_keep_their_proportions_at_any_length(total: int) -> None:
    config = load_recipe("quickstart", TrainRecipe)
    scaled = with_steps(config, total)
    before = sum(stage.steps for stage in config.stages)
    assert abs(sum(stage.steps for stage in scaled.stages) - total) <= len(config.stages)
    for old, new in zip(config.stages, scaled.stages, strict=True):
        assert abs(new.steps - old.steps * total / before) <= 1
        assert new.warmup_steps < new.steps
    TrainRecipe.model_validate(scaled.model_dump())
