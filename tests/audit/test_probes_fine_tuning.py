"""Layer-wise learning rates of every family, training that learns, and a run that is finished piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import unclipped.audit.fine_tuning as fine_tuning
from support.tiny_models import tiny_encoder, tiny_lm, tiny_vision_config
from unclipped.audit.config import EncoderEvaluationConfig, FineTuningConfig, TrainingViews
from unclipped.audit.features import EncoderExtractor, probe_rule
from unclipped.audit.fine_tuning import Pictures, Task, fine_tune, layers_of, parameter_groups, tune
from unclipped.audit.runner import evaluate_encoder
from unclipped.core.errors import UnclippedError, UsageError
from unclipped.data.sample import ImagePart
from unclipped.encoders.base import ENCODERS, VisionEncoder
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.llm_config import LLMVisionConfig

SIDE = 16
GRID = (2, 2)
# What stands before the blocks and after them, by the names that each family gives them.
LAST = re.compile(r"^(layernorm|norm|post_layernorm|decoder\.norm)\.")
BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def encoder_of(family: str, seed: int = 0) -> VisionEncoder:
    config: Any
    if family == "unclipped_llm_encoder":
        config = LLMVisionConfig(tiny_lm().config, patch_size=(8, 8))
    elif family == "siglip2_vision_model":
        config = tiny_vision_config(family)
        config.num_patches = 4
    else:
        config = tiny_vision_config(family)
    torch.manual_seed(seed)
    return build_encoder(config, baseline=True)


def drawn(count: int, seed: int, noise: float = 40.0) -> tuple[list[ImagePart], list[int]]:
    """Noise with a tint of red or of blue, which is the class."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for number in range(count):
        pixels = generator.normal(110, noise, size=(SIDE, SIDE, 3))
        pixels[:, :, 2 * (number % 2)] += 50
        images.append(ImagePart(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), f"{seed}-{number}"))
        labels.append(number % 2)
    return images, labels


def task_for(encoder: VisionEncoder, counts: tuple[int, int, int] = (32, 12, 20), key: str = "one") -> Task:
    rule = probe_rule(encoder, SIDE, "squash")
    learn, choose, test = (Pictures(*drawn(count, seed), rule) for seed, count in enumerate(counts))
    return Task(learn, choose, test, 2, key)


@pytest.mark.parametrize("family", sorted(ENCODERS.names()))
def test_learning_rates_fall_exactly_with_the_distance_from_the_head(family: str) -> None:
    encoder = encoder_of(family)
    names = {id(parameter): name for name, parameter in encoder.model.named_parameters()}
    head = nn.Linear(encoder.spec.hidden_size, 2)
    config = FineTuningConfig(layer_decay=0.5, weight_decay=0.3)
    layers = layers_of(encoder, GRID)
    seen = {}
    for group in parameter_groups(encoder, head, layers, 0.8, config):
        for parameter in group["params"]:
            name = names.get(id(parameter), "head")
            assert name == "head" or name not in seen, "a parameter is in one group only"
            seen[name] = group["lr"]
            assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 else 0.0)
    assert seen.keys() == {*names.values(), "head"}
    for name, rate in seen.items():
        inside = BLOCK.search(name)
        layer = 3 if name == "head" or LAST.search(name) else 1 + int(inside.group(1)) if inside else 0
        assert rate == 0.8 * 0.5 ** (3 - layer), name


def test_the_first_step_of_adamw_is_as_long_as_the_layer_s_learning_rate() -> None:
    """AdamW's first step moves every value by its learning rate: measured on the weights, not read from the groups."""
    encoder = encoder_of("vit")
    head = nn.Linear(encoder.spec.hidden_size, 2)
    config = FineTuningConfig(layer_decay=0.5, weight_decay=0.0)
    optimiser = torch.optim.AdamW(parameter_groups(encoder, head, layers_of(encoder, GRID), 0.01, config))
    before = {name: value.detach().clone() for name, value in encoder.model.named_parameters()}
    states = encoder.run(torch.randn(4, 4, encoder.spec.patch_values), [GRID] * 4, False).last_hidden_state
    head(states[:, 0]).square().sum().backward()
    optimiser.step()
    moved = {name: (value - before[name]).abs().max().item() for name, value in encoder.model.named_parameters()}
    projection = next(name for name in moved if name.endswith("projection.weight"))
    assert moved[projection] == pytest.approx(0.01 * 0.5**3, rel=1e-3)
    for number in (0, 1):
        inner = [move for name, move in moved.items() if f".{number}." in name and name.endswith("weight")]
        assert max(inner) == pytest.approx(0.01 * 0.5 ** (2 - number), rel=1e-3)


@pytest.mark.parametrize("family", sorted(ENCODERS.names()))
def test_every_family_learns_and_its_own_weights_stay(family: str) -> None:
    encoder = encoder_of(family)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    config = FineTuningConfig(steps=25, batch_size=16)
    with ThreadPoolExecutor(1) as pool:
        found = tune(encoder, task_for(encoder), 3e-3, config, torch.device("cpu"), pool)
    right = np.mean([number % 2 == label for number, label in enumerate(found.predictions)])
    assert found.development is not None
    assert min(found.development, float(right)) > 0.8
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_same_seed_gives_the_same_classes_and_another_one_does_not() -> None:
    encoder = encoder_of("dinov2")
    views = TrainingViews(scale=(0.6, 1.0), mirror=0.0)

    def run(**changes: Any) -> Any:
        config = FineTuningConfig(**({"steps": 4, "batch_size": 8, "augment": views} | changes))
        with ThreadPoolExecutor(3) as pool:
            found = tune(encoder, task, 1e-3, config, torch.device("cpu"), pool)
        return found.development, found.predictions

    task = task_for(encoder, (24, 10, 60))
    first = run()
    torch.manual_seed(99)
    assert run() == first
    assert torch.initial_seed() == 99, "the caller's random state is not used"
    assert run(seed=1) != first
    assert run(augment=None) != first


def test_views_are_those_of_their_draw() -> None:
    encoder = encoder_of("dinov2")
    pictures = task_for(encoder).learn
    views = TrainingViews(scale=(0.3, 0.5))
    with ThreadPoolExecutor(2) as pool:
        whole = pictures.views([3, 4, 5], 10, views, 7, pool)
        assert whole.shape == (3, 4, encoder.spec.patch_values)
        assert torch.equal(whole[1:2], pictures.views([4], 11, views, 7, pool))
        assert not torch.equal(whole[1:2], pictures.views([4], 12, views, 7, pool))
        assert not torch.equal(whole[1:2], pictures.views([4], 11, views, 8, pool))


def test_finished_learning_rates_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("dinov2")
    extractor = EncoderExtractor(encoder, probe_rule(encoder, SIDE, "squash"))
    config = FineTuningConfig(steps=3, batch_size=8, learning_rates=(1e-3, 1e-4))
    whole = fine_tune(extractor, task_for(encoder), config, tmp_path / "whole")
    original, trained = fine_tuning.tune, []

    def stops_at_the_second(*arguments: Any) -> Any:
        trained.append(arguments[2])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(fine_tuning, "tune", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(extractor, task_for(encoder), config, tmp_path / "cut")
    assert fine_tune(extractor, task_for(encoder), config, tmp_path / "cut") == whole
    assert trained == [1e-4, 1e-3, 1e-3]
    fine_tune(extractor, task_for(encoder, key="other labels"), config, tmp_path / "cut")
    assert trained[3:] == [1e-4, 1e-3], "other data is another training"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    encoder = encoder_of("dinov2")
    extractor = EncoderExtractor(encoder, probe_rule(encoder, SIDE, "squash"))
    config = FineTuningConfig(steps=1, learning_rates=(1e-4,))
    fine_tune(extractor, task_for(encoder), config, tmp_path)
    (path,) = tmp_path.iterdir()
    for text, message in (
        ("{", "not valid JSON.*delete the file"),
        ('{"development": 0.5, "predictions": [1]}', "found 1; delete"),
    ):
        path.write_text(text)
        with pytest.raises(UnclippedError, match=message):
            fine_tune(extractor, task_for(encoder), config, tmp_path)


def test_a_learning_rate_that_breaks_is_not_chosen(tmp_path: Path) -> None:
    encoder = encoder_of("dinov2")
    extractor = EncoderExtractor(encoder, probe_rule(encoder, SIDE, "squash"))
    config = FineTuningConfig(steps=12, batch_size=8, learning_rates=(1e-3, 1e30), clip_norm=None, warmup_share=0)
    best, scores = fine_tune(extractor, task_for(encoder), config, tmp_path)
    assert best.learning_rate == 1e-3
    assert scores["learning rate 1e+30"] == 0.0
    only = FineTuningConfig(steps=12, batch_size=8, learning_rates=(1e30,), clip_norm=None, warmup_share=0)
    with pytest.raises(UsageError, match="stopped being a number with each of"):
        fine_tune(extractor, task_for(encoder), only, tmp_path)


def test_an_encoder_in_chosen_layers_is_refused(tmp_path: Path) -> None:
    encoder, _ = load_encoder(str(tiny_encoder(tmp_path)), feature_layers=[1])
    with pytest.raises(UsageError, match=r"returns its layers \[1\], .* load it without feature_layers"):
        layers_of(encoder, GRID)


def test_views_of_images_that_are_not_square_are_refused() -> None:
    encoder = encoder_of("dinov2")
    rule = probe_rule(encoder, SIDE, "squash").model_copy(update={"size": (16, 24)})
    with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="views are square, but images are 16x24 px"):
        Pictures(*drawn(2, 0), rule).views([0], 0, TrainingViews(), 0, pool)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rates": []}, "at least 1 item"),
        ({"learning_rates": [1e-3, 1e-3]}, "each learning rate once"),
        ({"layer_decay": 0}, "greater than 0"),
        ({"augment": {"scale": [0.9, 0.2]}}, "expected the smaller bound first"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuningConfig(**fields)
    with pytest.raises(ValueError, match="fine_tuning: its classes and images are those of data"):
        EncoderEvaluationConfig(encoder="x", segmentation={}, fine_tuning={})


def folders(folder: Path) -> Path:
    for split, seed, count in (("train", 0, 30), ("test", 1, 16)):
        for number, (part, label) in enumerate(zip(*drawn(count, seed), strict=True)):
            path = folder / split / ("red", "blue")[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image: Any = part.source
            image.save(path)
    return folder


def vision(folder: Path) -> str:
    return str(tiny_encoder(folder))


def language_model(folder: Path) -> str:
    tiny_lm(folder)
    return f"llm:{folder}"


@pytest.mark.parametrize("make", [vision, language_model])
def test_beside_random_weights_and_raw_pixels(make: Callable[[Path], str], tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    config = EncoderEvaluationConfig(
        encoder=source,
        data={"source": str(folders(tmp_path / "data"))},
        probes=(),
        linear={"steps": 40, "learning_rates": [0.1, 1.0]},
        fine_tuning={"steps": 12, "batch_size": 8, "learning_rates": [1e-3, 3e-3]},
        random_seed=1,  # the tiny encoder itself is drawn with seed 0
        bootstrap_samples=100,
        raw_size=4,
        device="cpu",
        **({"image_size": SIDE, "patch_size": 8} if source.startswith("llm:") else {}),
    )
    results = evaluate_encoder(config, tmp_path / "out", console=Console(quiet=True))
    assert [row.arm for row in results.measurements] == ["encoder", "random_weights", "raw_pixels"]
    assert results.of("fine_tuning", "raw_pixels").chosen.startswith("linear probe, last block")
    assert results.of("fine_tuning").development.keys() == {"learning rate 0.001", "learning rate 0.003"}
    assert results.of("fine_tuning").figure.low < results.of("fine_tuning").figure.high
    assert results.differences["fine_tuning"].keys() == {"random_weights", "raw_pixels"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {(row["probe"], row["features"]) for row in rows} == {
        ("fine_tuning", arm) for arm in ("encoder", "random_weights", "raw_pixels")
    }
    assert len(list((tmp_path / "out" / "fine-tuning").iterdir())) == 4
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| fine-tuning | random weights |" in report
    assert "their row repeats the linear probe" in report
    for path, content in before.items():
        assert path.read_bytes() == content
