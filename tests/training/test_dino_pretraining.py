"""DINOv2 pretraining end to end: examples, the run, resume, several encoders, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unclipped.core.errors import DataError, UnclippedError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.views import MultiCrop
from unclipped.encoders.build import load_encoder
from unclipped.objectives.dino_side import load_dino_heads
from unclipped.objectives.dinov2 import DinoV2Objective
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.training.config import OptimizerConfig, PretrainConfig, TrainingConfig
from unclipped.training.dino_pretraining import dinov2_job
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.pretrain import pretrain

VIT = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DINOV2 = {name: value for name, value in VIT.items() if name != "intermediate_size"} | {"model_type": "dinov2"}
LLM = {
    "model_type": "unclipped_llm_encoder",
    "patch_size": 8,
    "text_config": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip


def dino(**fields: Any) -> PretrainConfig:
    options = {"local_crops": 2, "local_size": 16, "prototypes": 12, "head_hidden": 16, "bottleneck": 8}
    options |= fields.pop("dinov2", {})
    given = {
        "shape": VIT,
        "image_size": 32,
        "data": DataConfig(sources=(SourceConfig(source="generated:shapes"),)),
        "steps": 5,
        "batch_size": 4,
        "training": TrainingConfig(
            optimizer=OptimizerConfig(weight_decay=0.04), log_every_steps=2, threads=1, device="cpu"
        ),
    }
    return PretrainConfig(objective="dinov2", dinov2=DinoV2Config(**options), **(given | fields))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_examples_depend_on_the_seed_and_the_draw_alone() -> None:
    config = dino()
    examples = dinov2_job(config).make_examples(config.stage())
    batch, single = examples.batch([4, 5, 6]), examples.batch([5])
    assert batch["global_crops"].shape == (6, 3, 32, 32)
    assert batch["local_crops"].shape == (6, 3, 16, 16)
    assert batch["mask"].shape == (6, 16)
    for name in ("global_crops", "local_crops", "mask"):  # image 5 is number 1 of 3 in each group of crops
        assert torch.equal(batch[name][1::3], single[name])
    assert not torch.equal(single["global_crops"][0], single["global_crops"][1])
    masks = examples.batch(range(60))["mask"].sum(dim=1)
    assert 0.3 < float((masks > 0).double().mean()) < 0.7
    assert set(masks[masks > 0].tolist()) <= set(range(2, 9))


@pytest.mark.parametrize("channels", [1, 3])
def test_multi_crop_gives_global_then_local_views(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, channels), dtype=np.uint8)
    crop = MultiCrop(32, 16, 3)
    views = crop(pixels, np.random.default_rng(1))
    assert [view.shape for view in views] == [(32, 32, channels)] * 2 + [(16, 16, channels)] * 3
    assert all(view.dtype == np.uint8 for view in views)
    again = crop(pixels, np.random.default_rng(1))
    assert all(np.array_equal(one, other) for one, other in zip(views, again, strict=True))


@pytest.mark.parametrize("shape", [VIT, DINOV2, LLM], ids=["vit", "dinov2", "llm"])
def test_pretraining_writes_an_encoder_that_loads(shape: dict[str, Any], tmp_path: Path) -> None:
    result = pretrain(dino(shape=shape, gradient_accumulation=2), tmp_path / "run")
    assert result.record["finished"]
    encoder, _ = load_encoder(str(result.model_folder))
    assert encoder.spec.objective == "self_supervised"
    assert torch.isfinite(encoder(torch.randn(16, 192), torch.tensor([[1, 4, 4]]))).all()


@pytest.mark.parametrize("ibot_weight", [0.0, 1.0])
def test_the_teachers_heads_are_kept_beside_the_encoder(ibot_weight: float, tmp_path: Path) -> None:
    config = dino(dinov2={"ibot_weight": ibot_weight})
    job = dinov2_job(config)
    objective: Any = job.make_objective(config.stage(), {})
    for parameter in objective.teacher.parameters():
        torch.nn.init.normal_(parameter)
    job.save(tmp_path / "model")
    heads, teacher = load_dino_heads(tmp_path / "model"), objective.teacher
    features = torch.randn(3, 16)
    assert heads.dino_head is not None
    assert heads.mask_token is not None
    assert torch.equal(heads.dino_head(features), teacher.dino_head(features))
    assert torch.equal(heads.mask_token, teacher.trunk.mask_token)
    assert (heads.ibot_head is None) == (ibot_weight == 0)
    if heads.ibot_head is not None:
        assert torch.equal(heads.ibot_head(features), teacher.ibot_head(features))


ALL_SCHEDULES: dict[str, Any] = {
    "shape": DINOV2 | {"drop_path_rate": 0.4},
    "warmup_steps": 1,
    "schedule_steps": 4,
    "final_learning_rate": 1e-5,
    "clip_norm": 0.5,
    "clip_per_module": True,
    "gradient_accumulation": 2,
    "training": TrainingConfig(
        optimizer=OptimizerConfig(
            weight_decay=0.04, final_weight_decay=0.2, patch_embedding_factor=0.2, layer_decay=0.9
        ),
        log_every_steps=2,
        threads=1,
        device="cpu",
    ),
}


@pytest.mark.parametrize(("centring", "fields"), [("sinkhorn", ALL_SCHEDULES), ("ema", {})])
def test_an_interrupted_run_resumes_to_an_equal_teacher(
    centring: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"centring": centring, "frozen_prototype_steps": 2, "teacher_momentum": (0.5, 1.0)}
    config = dino(dinov2=options | {"teacher_temperature_steps": 4, "ibot_bottleneck": 6}, **fields)
    whole = pretrain(config, tmp_path / "whole")
    after_step = DinoV2Objective.after_step

    def stop_in_step_three(self: DinoV2Objective) -> None:
        after_step(self)
        if int(self.step) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(DinoV2Objective, "after_step", stop_in_step_three)
    with pytest.raises(TrainingInterrupted, match="step 3 of 5"):
        pretrain(config, tmp_path / "parts")
    monkeypatch.undo()
    parts = pretrain(config, tmp_path / "parts", resume=True)
    one, other = (load_encoder(str(result.model_folder))[0].state_dict() for result in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    heads, others = (load_dino_heads(result.model_folder).state_dict() for result in (whole, parts))
    assert all(torch.equal(value, others[name]) for name, value in heads.items())
    assert parts.record["stages"][0]["final_loss"] == whole.record["stages"][0]["final_loss"]
    timed = ("samples_per_second", "tokens_per_second", "data_waiting_share", "seconds")
    lines = [
        [{key: value for key, value in row.items() if key not in timed} for row in metrics(folder)]
        for folder in (tmp_path / "parts", tmp_path / "whole")
    ]
    assert lines[0] == lines[1]
    if fields:
        last = lines[0][-1]
        assert set(last["gradient_norms"]) == {"trunk", "dino_head", "ibot_head"}
        assert last["schedules"] == pytest.approx(
            {"weight_decay.vision": 0.2, "teacher_temperature": 0.07, "teacher_momentum": 1.0}
        )
        assert last["learning_rates"]["vision"] == pytest.approx(1e-5)
        saved = json.loads((parts.model_folder / "config.json").read_text())
        assert saved["drop_path_rate"] == 0.0


def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), (200, 30, 60)).save(tmp_path / "small.png")
    views = MultiCrop(32, 16, 1)(np.asarray(Image.open(tmp_path / "small.png")), np.random.default_rng(0))
    assert [view.shape[0] for view in views] == [32, 32, 16]
    with pytest.raises(DataError, match=r"at least 2×2 px, found 1×9"):
        MultiCrop(32, 16, 1)(np.zeros((1, 9, 3), dtype=np.uint8), np.random.default_rng(0))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unclipped.objectives.dinov2.dino_loss", lambda t, g, loc, temperature: g.sum() * float("nan"))
    with pytest.raises(UnclippedError, match=r"step 1: loss \(in dino\) is nan; samples of the batch"):
        pretrain(dino(), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 1}, r"batch_size: koleo needs at least two images.*found 1"),
        ({"batch_size": 4, "gradient_accumulation": 4}, r"koleo needs at least two images.*found 1"),
        (
            {"dinov2": {"local_size": 18}},
            r"dinov2\.local_size: local crops of 18 px are no multiple of the patch of 8×8",
        ),
        ({"image_size": 36}, r"image_size 36 is no multiple of patch_size 8"),
        ({"shape": LLM, "image_size": 36}, r"image_size: 36 px are no multiple of the patch of 8×8 px"),
        ({"shape": {"model_type": "vit_mae"}}, r"shape\.model_type: no encoder 'vit_mae' to train"),
        ({"data": DataConfig(sources=(SourceConfig(source="generated:shapes", options={"as_text": True}),))}, "image"),
    ],
)
def test_bad_input(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        pretrain(dino(**fields), tmp_path / "run")
