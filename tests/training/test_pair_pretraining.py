"""Pretraining on image-text pairs end to end: examples, the run, resume, the text side, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_support import COLOURS, VIT, write_pairs

from support.tiny_models import tiny_lm
from unclipped.core.errors import CheckpointError, DataError, UsageError
from unclipped.data.config import AugmentConfig, DataConfig, RandomCrop, SourceConfig
from unclipped.encoders.build import load_encoder
from unclipped.models.assemble import assemble
from unclipped.models.checkpoint import load_model, save_model
from unclipped.models.config import ModelConfig
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.text_side import PAIR_OBJECTIVES, load_text_side
from unclipped.recipes.schema import PretrainRecipe
from unclipped.recipes.validation import load_recipe
from unclipped.training.config import OptimizerConfig, PretrainConfig, TokenizerConfig, TrainingConfig
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.pair_pretraining import comparison_job
from unclipped.training.pretrain import pretrain

LLM = {
    "model_type": "unclipped_llm_encoder",
    "patch_size": 8,
    "text_config": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip
PAIRS: dict[str, Any] = {
    "embedding_size": 8, "context_length": 12, "text_width": 16, "text_layers": 1, "text_heads": 2,
    "decoder_layers": 1, "caption_queries": 4,
}  # fmt: skip
OBJECTIVES = list(PAIR_OBJECTIVES)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def config(folder: Path, objective: str = "contrastive", **fields: Any) -> PretrainConfig:
    given = {
        "shape": VIT,
        "image_size": 16,
        "data": DataConfig(
            sources=(SourceConfig(source=str(folder)),), augment=AugmentConfig(steps=(RandomCrop(minimum_area=0.8),))
        ),
        "tokenizer": TokenizerConfig(vocabulary_size=280),
        "steps": 5,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "training": TrainingConfig(
            optimizer=OptimizerConfig(weight_decay=0.1), log_every_steps=2, threads=1, device="cpu"
        ),
    }
    pairs = PairsConfig(**(PAIRS | fields.pop("pairs", {})))
    return PretrainConfig(objective=objective, pairs=pairs, **(given | fields))  # type: ignore[arg-type]


def test_examples_depend_on_the_seed_and_the_draw_alone(colours: Path) -> None:
    given = config(colours)
    examples = comparison_job(given).make_examples(given.stage())
    batch, single = examples.batch([4, 5, 6]), examples.batch([5])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["sample_ids"][1] == single["sample_ids"][0]
    torch.testing.assert_close(batch["pixel_values"][1], single["pixel_values"][0], rtol=0, atol=0)
    length = int(single["attention_mask"].sum())
    assert torch.equal(batch["input_ids"][1, :length], single["input_ids"][0])
    epoch = examples.batch(range(12))
    assert abs(float(epoch["pixel_values"].mean())) < 0.2
    assert len(set(epoch["sample_ids"])) == 12
    later = examples.batch(range(12, 24))
    again = later["pixel_values"][later["sample_ids"].index(epoch["sample_ids"][0])]
    assert not torch.equal(again, epoch["pixel_values"][0])  # augmented anew
    assert all(length > 4 for length in examples.lengths([0, 1]))


@pytest.mark.parametrize(
    ("objective", "shape"), [("contrastive", LLM), ("sigmoid", VIT), ("coca", VIT)], ids=OBJECTIVES
)
def test_a_run_writes_an_encoder_that_is_a_declared_baseline_and_its_text_side(
    objective: str, shape: dict[str, Any], colours: Path, tmp_path: Path
) -> None:
    result = pretrain(config(colours, objective, shape=shape, gradient_accumulation=2), tmp_path / "run")
    assert result.record["finished"]
    with pytest.raises(UsageError, match="baseline: true"):
        load_encoder(str(result.model_folder))
    encoder, _ = load_encoder(str(result.model_folder), baseline=True)
    assert encoder.spec.objective == PAIR_OBJECTIVES[objective].declared
    side = load_text_side(result.model_folder)
    texts, images = (
        side.encode_text(["a red thing", "a blue thing", "red"]),
        side.encode_images(torch.randn(2, 3, 16, 16)),
    )
    assert (texts.shape, images.shape) == ((3, 8), (2, 8))
    for features in (texts, images):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    torch.testing.assert_close(side.encode_text(["red"])[0], texts[2])
    assert (side.logit_bias is None) == (objective != "sigmoid")
    assert 1 < side.logit_scale <= 100
    assert side.rule.mean == encoder.spec.mean
    assert (side.encode_text([]).shape, side.encode_images(torch.zeros(0, 3, 16, 16)).shape) == ((0, 8), (0, 8))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_was_learned_names_the_colours_of_images(objective: str, colours: Path, tmp_path: Path) -> None:
    """The saved encoder and text side agree, so a fault of saving, loading or preparing images would show."""
    given = config(colours, objective, steps=60, learning_rate=3e-3, batch_size=12, pairs={"chunk": 5})
    folder = pretrain(given, tmp_path / "run").model_folder
    side = load_text_side(folder)
    names = list(COLOURS)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (side.rule.mean, side.rule.std))
    pixels = torch.stack([torch.tensor(COLOURS[name]).view(3, 1, 1).expand(3, 16, 16) / 255 for name in names])
    texts = side.encode_text([f"a {name} thing" for name in names])
    scores = side.encode_images((pixels - mean) / std) @ texts.T
    assert scores.argmax(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_interrupted_run_resumes_to_equal_files(
    objective: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(colours, objective)
    whole = pretrain(given, tmp_path / "whole")
    kind, steps = PAIR_OBJECTIVES[objective], []
    after_step = kind.after_step

    def stop_in_step_three(self: Any) -> None:
        after_step(self)
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(kind, "after_step", stop_in_step_three)
    with pytest.raises(TrainingInterrupted, match="step 3 of 5"):
        pretrain(given, tmp_path / "parts")
    monkeypatch.undo()
    parts = pretrain(given, tmp_path / "parts", resume=True)
    for name in ("model.safetensors", "text_side/text_side.safetensors", "text_side/tokenizer.json"):
        assert (whole.model_folder / name).read_bytes() == (parts.model_folder / name).read_bytes()
    assert parts.record["stages"][0]["final_loss"] == whole.record["stages"][0]["final_loss"]


def test_an_assembled_model_stays_a_baseline(colours: Path, tmp_path: Path) -> None:
    folder = pretrain(config(colours, steps=1), tmp_path / "run").model_folder
    tiny_lm(text := tmp_path / "lm")
    with pytest.raises(UsageError, match="baseline: true"):
        assemble(ModelConfig(vision=str(folder), text=str(text)))
    model, processor, report = assemble(ModelConfig(vision=str(folder), text=str(text), baseline=True))
    assert report.objective == "contrastive"
    save_model(model, processor, tmp_path / "vlm")
    again, _ = load_model(str(tmp_path / "vlm"))
    assert again.model.vision_tower.spec.objective == "contrastive"


def test_a_bad_pair_can_be_skipped(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs", answer="  ")
    data = DataConfig(sources=(SourceConfig(source=str(folder)),), on_bad_sample="skip")
    given = config(folder, data=data, steps=4)
    assert pretrain(given, tmp_path / "run").record["finished"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": None}, r"pair-2.*exactly one image.*found 0"),
        ({"image": ["2.png", "3.png"]}, r"pair-2.*exactly one image.*found 2"),
        ({"answer": None}, r"pair-2.*exactly one assistant turn.*found 0"),
        ({"answer": "  "}, r"pair-2.*exactly one assistant turn with text.*found 0"),
        ({"answer": "a thing " * 20}, r"sample pair-2: the caption has \d+ tokens, more than pairs\.context_length 12"),
    ],
    ids=["no image", "two images", "no caption", "empty caption", "long caption"],
)
def test_bad_pairs_are_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs", **changed)
    with pytest.raises(DataError, match=message):
        pretrain(config(folder), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 1}, r"batch_size: \w+ compares at least two pairs of a micro-batch.*found 1"),
        ({"gradient_accumulation": 4}, r"at least two pairs of a micro-batch.*found 1.*lower gradient_accumulation"),
        ({"image_size": 20}, r"image_size 20 is no multiple of patch_size 8"),
        ({"image_size": 20, "shape": LLM}, r"image_size: 20 px are no multiple of the patch of 8×8 px"),
        ({"shape": {"model_type": "vit_mae"}}, r"shape\.model_type: no encoder 'vit_mae' to train"),
        ({"data": {"share_image": True}}, r"data\.share_image: \w+ learns from single images with their captions"),
        ({"data": {"blind": "blank"}}, r"data\.blind: \w+ learns from single images with their captions"),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str, colours: Path, tmp_path: Path) -> None:
    if isinstance(data := fields.get("data"), dict):
        fields = fields | {"data": DataConfig(sources=(SourceConfig(source=str(colours)),), **data)}
    with pytest.raises(UsageError, match=message):
        pretrain(config(colours, **fields), tmp_path / "run")


def test_a_text_side_that_does_not_fit_is_refused(colours: Path, tmp_path: Path) -> None:
    folder = pretrain(config(colours, steps=1), tmp_path / "run").model_folder
    with pytest.raises(CheckpointError, match=r"no text_side/text_side\.json in this folder"):
        load_text_side(tmp_path)
    description = folder / "text_side" / "text_side.json"
    fields = json.loads(description.read_text())
    for change, message in (
        ({"pairs": fields["pairs"] | {"text_layers": 2}}, r"missing 12: text\.blocks\.1"),
        ({"pairs": fields["pairs"] | {"embedding_size": 9}}, r"misshaped 2: image_projection.*found \(8, 16\)"),
        ({"pairs": {"widht": 3}}, r"not the description of a text side"),
        ({"objective": "clip"}, r"not the description of a text side"),
    ):
        description.write_text(json.dumps(fields | change))
        with pytest.raises(CheckpointError, match=message):
            load_text_side(folder)
    description.write_text("{")
    with pytest.raises(CheckpointError, match=r"text_side\.json: not valid JSON"):
        load_text_side(folder)
    description.write_text(json.dumps(fields))
    (folder / "text_side" / "text_side.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"text_side\.safetensors: cannot be read as weights"):
        load_text_side(folder)


def test_the_recipe_gives_the_shape_of_the_other_arms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNCLIPPED_DATA", str(tmp_path))
    own, other = (load_recipe(f"clothing-{name}", PretrainRecipe, []) for name in ("contrastive", "dino"))
    assert own.objective == "contrastive"
    # The learning rate is not among them: each objective learns at a rate of its own.
    for field in ("shape", "steps", "batch_size", "warmup_steps"):
        assert getattr(own, field) == getattr(other, field)
    assert own.data.sources == other.data.sources
