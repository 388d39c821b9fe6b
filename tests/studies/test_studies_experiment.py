"""An experiment: arms that differ in one thing, figures in the promised form, frozen parts untouched, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.tiny_models import tiny_lm
from unclipped.recipes.schema import TrainRecipe
from unclipped.recipes.validation import validate
from unclipped.studies.experiment import arms_of, run_experiment

pytestmark = pytest.mark.slow

SOURCE = {"source": "generated:characters", "options": {"tasks": {"read_number": 1, "colour": 1}}}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    tiny_lm(folder)
    return str(folder)


def recipe(language_model: str, **changes: object) -> TrainRecipe:
    fields = {
        "model": {
            "vision": {"llm": language_model, "patch_size": 8},
            "text": language_model,
            "connector": "average(1x2) + standardise + linear",
            "image": {"rule": "squash", "size": [24, 64]},
        },
        "pixel_statistics": "data",
        "data": {"sources": [SOURCE]},
        "stages": [
            {"name": "align", "train": {"connector": 1e-2}, "steps": 2, "batch_size": 4},
            {"name": "all", "train": {"vision": 1e-3, "connector": 1e-3, "text": 1e-3}, "steps": 2, "batch_size": 4},
        ],
        "training": {"threads": 1, "log_every_steps": 1},
        "held_out_text": [SOURCE | {"split": "test", "options": {"as_text": True}}],
        "held_out_blocks": 2,
        "evaluation": {
            "tasks": [{"name": "read", "source": SOURCE | {"split": "test"}, "limit": 12, "max_new_tokens": 3}]
        },
    }
    return validate(fields | changes, TrainRecipe, "test")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_arms_train_alike_and_figures_have_the_promised_form(language_model: str, tmp_path: Path) -> None:
    config = recipe(language_model, baselines=["blind", "random_encoder"])
    said: list[str] = []
    results = run_experiment(config, tmp_path, recipe_text="a recipe", say=said.append)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results) == ["model", "blind", "random_encoder"]
    for rows in results.values():
        assert set(rows) == {"read_number", "colour"}
        for row in rows.values():
            assert set(row) == {"accuracy", "low", "high", "count"}
            assert row["low"] <= row["accuracy"] <= row["high"]
    page = (tmp_path / "report.html").read_text()
    assert "a recipe" in page
    assert "random encoder" in page
    assert len(list((tmp_path / "examples").glob("*.png"))) == 3
    for arm in arms_of(config, tmp_path):
        record = json.loads((arm.folder / "training.json").read_text())
        assert [stage["steps"] for stage in record["stages"] if "seconds" in stage] == [2] * (
            1 if arm.name == "blind" else 2  # without images there is nothing for the connector alone to learn
        )
        predictions = (arm.folder / "evaluation" / "predictions" / "read" / "predictions.jsonl").read_text()
        assert len(predictions.splitlines()) == 12

    # Only the encoder's start differs in the random arm; the blind arm never touched the encoder.
    begun = tensors(tmp_path / "baselines" / "blind")
    model, random = tensors(tmp_path), tensors(tmp_path / "baselines" / "random_encoder")
    tower = [name for name in begun if "vision_tower" in name and "layers" in name and name.endswith("proj.weight")]
    assert tower
    for name in tower:
        near, far = (model[name] - begun[name]).norm(), (random[name] - begun[name]).norm()
        assert near < 0.2 * far

    # A finished run is taken as it is.
    before = (tmp_path / "arm.json").stat().st_mtime_ns
    assert run_experiment(config, tmp_path, resume=True, say=said.append) == results
    assert (tmp_path / "arm.json").stat().st_mtime_ns == before


def test_a_frozen_encoder_and_language_model_stay_as_they_were_bit_for_bit(language_model: str, tmp_path: Path) -> None:
    stages = [{"name": "connector", "train": {"connector": 1e-2}, "steps": 3, "batch_size": 4}]
    run_experiment(recipe(language_model, stages=stages), tmp_path, say=lambda text: None)
    trained = tensors(tmp_path)
    lm = load_file(Path(language_model) / "model.safetensors")
    for name, tensor in lm.items():
        inside = f"model.language_model.{name.removeprefix('model.')}"
        if inside in trained:
            assert torch.equal(trained[inside], tensor), name
    assert sum(f"model.language_model.{name.removeprefix('model.')}" in trained for name in lm) >= len(lm) - 1
    encoder = {name: tensor for name, tensor in trained.items() if ".vision_tower." in name and ".stem." not in name}
    for name, tensor in encoder.items():
        source = "model." + name.split(".decoder.", 1)[1]
        assert torch.equal(tensor, lm[source]), name
    record = json.loads((tmp_path / "training.json").read_text())
    (stage,) = record["stages"]
    assert stage["text_perplexity"]["before"] == stage["text_perplexity"]["after"]
    assert stage["parameters"]["vision"]["trainable"] == 0 == stage["parameters"]["text"]["trainable"]
    assert stage["parameters"]["connector"]["trainable"] > 0


def test_the_blind_arm_of_a_connector_only_recipe_sees_blank_images(language_model: str, tmp_path: Path) -> None:
    from unclipped.core.errors import UsageError

    stages = [{"name": "connector", "train": {"connector": 1e-2}, "steps": 2, "batch_size": 4}]
    with pytest.raises(UsageError, match="blind_image: blank"):
        recipe(language_model, stages=stages, baselines=["blind"])
    config = recipe(language_model, stages=stages, baselines=["blind"], blind_image="blank")
    results = run_experiment(config, tmp_path, say=lambda text: None)
    answers = [
        json.loads(line)["prediction"]
        for line in (tmp_path / "baselines" / "blind" / "evaluation" / "predictions" / "read" / "predictions.jsonl")
        .read_text()
        .splitlines()
        if json.loads(line)["category"] == "read_number"
    ]
    assert len(set(answers)) == 1, "blank images of one size and one question can only give one answer"
    assert set(results) == {"model", "blind"}
