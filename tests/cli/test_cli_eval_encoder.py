"""`unclipped eval-encoder` through the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bad_input_support import Models, Outcome, Place, expect_error, make_models, unclipped

Run = Callable[..., Outcome]
SHORT = (
    "linear.steps=5", "linear.learning_rates=[0.1]", "knn.k=[1]", "bootstrap_samples=100", "raw_size=4", "device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(tmp_path, models)
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: unclipped(monkeypatch, capsys, "eval-encoder", *arguments)


def labelled(place: Place) -> str:
    for split in ("train", "test"):
        for number in range(8):
            place.image(f"photos/{split}/{'ab'[number % 2]}/{number}.png", 16 + number, 16 + len(split))
    return "photos"


def test_probes_with_one_command_and_again_from_its_recipe(place: Place, run: Run) -> None:
    data = labelled(place)
    done = run(place.models.vision, *SHORT, "--data", data, "--output", "out")
    assert (done.status, done.err) == (0, "")
    assert "random weights" in done.out
    assert {path.name for path in Path("out").iterdir()} == {
        "recipe.yaml", "environment.json", "inputs.json", "features", "predictions.jsonl", "results.json", "report.md",
    }  # fmt: skip
    again = run(place.models.vision, "--recipe", "out/recipe.yaml", "--output", "again")
    assert again.status == 0, again
    assert json.loads(Path("again/results.json").read_text()) == json.loads(Path("out/results.json").read_text())
    expect_error(run(place.models.vision, *SHORT, "--data", data, "--output", "out"), 2, "not empty", "--resume")
    assert run(place.models.vision, *SHORT, "--data", data, "--output", "out", "--resume").status == 0
    expect_error(
        run(place.models.vision, *SHORT, "seed=3", "--data", data, "--output", "out", "--resume"),
        2,
        "recipe.yaml differs",
    )


def test_a_contrastive_encoder_is_a_declared_baseline(place: Place, run: Run) -> None:
    arguments = (place.models.clip, *SHORT, "--data", labelled(place), "--output", "out")
    expect_error(run(*arguments), 2, "declared baseline only", "--baseline")
    assert not Path("out").exists()
    assert run(*arguments, "--baseline").status == 0


def test_masks(place: Place, run: Run) -> None:
    few = ("segmentation.steps=2", "segmentation.train_limit=4", "segmentation.test_limit=3")
    done = run(place.models.vision, *SHORT, *few, "--segmentation", "generated:shapes", "--output", "out")
    assert done.status == 0, done
    assert "mIoU" in done.out
    assert not Path("out/predictions.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "nothing to measure: give data"),
        (("linear.stepps=3", "--data", "photos"), 2, "unknown field 'linear.stepps' (did you mean 'steps'?"),
        (("--data", "missing"), 1, "missing: no such file or folder"),
        (("patch_size=8", "--data", "photos"), 2, "patch_size: only for encoders made of a language model"),
    ],
)
def test_mistakes_get_one_line(place: Place, run: Run, arguments: tuple[str, ...], status: int, message: str) -> None:
    labelled(place)
    expect_error(run(place.models.vision, *arguments, "--output", "out"), status, message)
    assert not Path("out").exists()
