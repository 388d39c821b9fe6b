"""Memory over the steps of pretraining: what a step takes is given back."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from unclipped.data.config import DataConfig, SourceConfig
from unclipped.objectives.masked_autoencoder import MaskedAutoencoderObjective
from unclipped.training.config import PretrainConfig, TrainingConfig
from unclipped.training.image_pretraining import masked_autoencoder_job
from unclipped.training.pretrain import pretrain


def config(steps: int, limit: int | None = None) -> PretrainConfig:
    shape = {"image_size": 48, "patch_size": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return PretrainConfig(
        objective="masked_autoencoder",
        shape=shape,
        steps=steps,
        batch_size=2,
        data=DataConfig(sources=(SourceConfig(source="generated:shapes", limit=limit),)),
        training=TrainingConfig(log_every_steps=10, threads=1, device="cpu", workers=0),
    )


def test_memory_does_not_grow_with_the_steps_of_masked_autoencoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []
    monkeypatch.setattr(
        MaskedAutoencoderObjective, "after_step", lambda self: traced.append(tracemalloc.get_traced_memory()[0])
    )
    tracemalloc.start(1)
    try:
        pretrain(config(60), tmp_path)
    finally:
        tracemalloc.stop()
    assert (traced[-1] - traced[20]) / (len(traced) - 21) < 1024, traced


@pytest.mark.parametrize("limit", [None, 40, 500], ids=["endless", "seen again", "seen once"])
def test_prepared_images_take_no_more_memory_from_step_to_step(limit: int | None) -> None:
    settings = config(100, limit)
    examples = masked_autoencoder_job(settings).make_examples(settings.stages()[0])
    examples.batch([0, 1])
    for index in range(400):  # what drawing shapes keeps is kept now
        examples.mixture.read(index)  # type: ignore[attr-defined]
    tracemalloc.start(1)
    try:
        traced = []
        for step in range(50):
            examples.batch([2 * step, 2 * step + 1])
            traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert (traced[-1] - traced[5]) / (len(traced) - 6) < 1024, traced


def test_images_that_come_again_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import unclipped.training.image_pretraining as image_pretraining

    settings = config(100, limit=10)
    examples = masked_autoencoder_job(settings).make_examples(settings.stages()[0])
    first = [examples.batch([index]) for index in range(10)]
    loaded: list[str] = []
    prepare = image_pretraining.pixels
    monkeypatch.setattr(
        image_pretraining, "pixels", lambda part, rule: loaded.append(part.label) or prepare(part, rule)
    )
    again = [examples.batch([index]) for index in range(10)]
    assert not loaded
    for one, two in zip(first, again, strict=True):
        assert one["sample_ids"] == two["sample_ids"]
        assert one["pixel_values"].equal(two["pixel_values"])
