"""Schedules against NumPy written from their formulas, groups of parameters, and clipping of each module by itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils import clip_grad_norm_
from training_support import small_language_model

from unclipped.core.errors import UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.objectives.base import Objective
from unclipped.objectives.dinov2 import DinoV2Objective
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.objectives.trunk import build_trunk
from unclipped.training.clipping import clip_each, joint_norm, parameters_by_module
from unclipped.training.config import OptimizerConfig, PretrainConfig, StageConfig
from unclipped.training.optim import build_optimizer, build_scheduler, learning_rates, weight_decays

WIDTHS = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT = WIDTHS | {"intermediate_size": 32}
DINOV2 = WIDTHS | {"model_type": "dinov2"}
LLM = {
    "model_type": "unclipped_llm_encoder",
    "patch_size": 8,
    "text_config": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip


def objective(shape: dict[str, Any], **options: Any) -> DinoV2Objective:
    torch.manual_seed(0)
    sizes = {"prototypes": 12, "head_hidden": 16, "bottleneck": 8, "ibot_bottleneck": 6} | options
    size = None if shape is LLM else 32
    return DinoV2Objective(
        build_trunk(shape, image_size=size, maskable=True), DinoV2Config.model_validate(sizes), steps=10
    )


def course(start: float, end: float, steps: int, length: int, warmup: int = 0) -> np.ndarray:
    """Values at steps 0 … steps − 1: (t + 1)/(w + 1) of the start, then end + (start − end)·(1 + cos(π·u))/2 with
    u = (t − w)/(length − w), and the end from `length` on."""
    t = np.arange(steps, dtype=np.float64)
    u = np.minimum((t - warmup) / (length - warmup), 1.0)
    falling = end + (start - end) * (1 + np.cos(np.pi * u)) / 2
    return np.where(t < warmup, start * (t + 1) / (warmup + 1), falling)


@pytest.mark.parametrize("length", [None, 9, 30], ids=["at the last step", "before it", "after it"])
def test_every_schedule_equals_its_formula(length: int | None) -> None:
    steps, end = 14, length or 14
    stage = StageConfig(train={"vision": 2e-3}, steps=steps, warmup_steps=3, final_ratio=0.05, schedule_steps=length)
    config = OptimizerConfig(weight_decay=0.04, final_weight_decay=0.2, patch_embedding_factor=0.2, layer_decay=0.5)
    own = objective(
        DINOV2,
        teacher_momentum=(0.9, 1.0),
        teacher_temperature=(0.04, 0.07),
        teacher_temperature_steps=5,
    )
    own.steps = stage.schedule_length
    optimizer = build_optimizer(own, stage, config, own.part_of)
    scheduler = build_scheduler(optimizer, stage, config)
    rates, decays, temperatures, momenta, by_group = [], [], [], [], []
    for _ in range(steps):
        rates.append(learning_rates(optimizer)["vision"])
        decays.append(weight_decays(optimizer)["vision"])
        by_group.append([(g["lr"] / g["factor"], g["weight_decay"]) for g in optimizer.param_groups])
        values = own.schedules()
        temperatures.append(values["teacher_temperature"])
        momenta.append(values["teacher_momentum"])
        optimizer.step()
        scheduler.step()
        own.after_step()
    expected = course(2e-3, 1e-4, steps, end, warmup=3)
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    expected_decays = course(0.04, 0.2, steps, end)
    np.testing.assert_allclose(decays, expected_decays, rtol=1e-12)
    np.testing.assert_allclose(momenta, course(0.9, 1.0, steps, end), rtol=1e-12)
    linear = 0.04 + 0.03 * np.minimum(np.arange(steps) / 5, 1.0)
    np.testing.assert_allclose(temperatures, linear, rtol=1e-12)
    is_decayed = [group["is_decayed"] for group in optimizer.param_groups]
    assert set(is_decayed) == {True, False}
    for step, groups in enumerate(by_group):
        for (rate, decay), decayed in zip(groups, is_decayed, strict=True):
            assert rate == pytest.approx(expected[step], rel=1e-12)
            assert decay == pytest.approx(expected_decays[step] if decayed else 0.0, rel=1e-12)


def test_a_constant_decay_stays() -> None:
    stage = StageConfig(train={"vision": 1e-3}, steps=4)
    config = OptimizerConfig(weight_decay={"vision": 0.3})
    own = objective(VIT)
    optimizer = build_optimizer(own, stage, config, own.part_of)
    scheduler = build_scheduler(optimizer, stage, config)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        assert weight_decays(optimizer) == {"vision": 0.3}


@pytest.mark.parametrize("shape", [VIT, DINOV2, LLM], ids=["vit", "dinov2", "llm"])
def test_which_parameters_decay_and_which_factor_they_have(shape: dict[str, Any]) -> None:
    own = objective(shape)
    stage, decay = StageConfig(train={"vision": 2e-3}, steps=4), 0.5
    config = OptimizerConfig(weight_decay=0.1, patch_embedding_factor=0.2, layer_decay=decay)
    groups = build_optimizer(own, stage, config, own.part_of).param_groups
    found = {id(p): group for group in groups for p in group["params"]}
    seen: dict[str, set[float]] = {}
    for name, parameter in own.named_parameters():
        if not parameter.requires_grad:
            assert name.startswith("teacher.")
            continue
        group, pieces = found.pop(id(parameter)), name.split(".")
        vectors = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "lambda1", "gain")
        is_vector = name.endswith(vectors) or "norm" in pieces[-2] or name.endswith("mask_token")
        assert group["weight_decay"] == (0.0 if is_vector else 0.1), name
        numbers = [int(piece) for piece in pieces if piece.isdigit()]
        is_head = pieces[1].endswith("_head")
        if is_head or "layernorm" in pieces or name.endswith("decoder.norm.weight"):
            kind, power, more = "top", 0, 1.0
        elif numbers:
            kind, power, more = f"block {numbers[0]}", 3 - numbers[0], 1.0
        elif "patch_embeddings" in pieces or "stem" in pieces:
            kind, power, more = "patch embedding", 4, 0.2
        else:  # positions, class token, mask token
            kind, power, more = "embeddings", 4, 1.0
        assert group["factor"] == pytest.approx(decay**power * more), name
        assert group["lr"] == pytest.approx(2e-3 * decay**power * more), name
        seen.setdefault(kind, set()).add(group["factor"])
    assert not found
    assert set(seen) == {"top", "block 0", "block 1", "block 2", "patch embedding", "embeddings"}
    assert all(len(factors) == 1 for factors in seen.values())


def test_by_default_all_learn_alike_and_muon_takes_the_factors_too() -> None:
    own, stage = objective(VIT), StageConfig(train={"vision": 2e-3}, steps=4)
    plain = build_optimizer(own, stage, OptimizerConfig(), own.part_of).param_groups
    assert {(group["factor"], group["lr"]) for group in plain} == {(1.0, 2e-3)}
    assert len(plain) == 2
    config = OptimizerConfig(name="muon", muon_learning_rate=0.4, layer_decay=0.5)
    muon = [g for g in build_optimizer(own, stage, config, own.part_of).param_groups if g["optimizer"] == "muon"]
    assert sorted(group["lr"] for group in muon) == pytest.approx([0.05, 0.1, 0.2, 0.4])  # three blocks, the heads


def test_factors_without_an_encoder_are_refused() -> None:
    stage = StageConfig(train={"text": 1e-3}, steps=1)
    for field in ({"layer_decay": 0.9}, {"patch_embedding_factor": 0.2}):
        with pytest.raises(UsageError, match="are about a vision encoder, and this model has none"):
            build_optimizer(small_language_model(), stage, OptimizerConfig(**field), lambda _: "text")


def test_an_update_uses_each_groups_own_rate_and_decay() -> None:
    """One step of AdamW written out: p·(1 − lr·wd) − lr·g/(|g| + eps), since both bias corrections cancel."""
    own = objective(DINOV2)
    stage = StageConfig(train={"vision": 2e-3}, steps=4)
    config = OptimizerConfig(weight_decay=0.1, patch_embedding_factor=0.2, layer_decay=0.5)
    optimizer = build_optimizer(own, stage, config, own.part_of)
    trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
    before = {name: p.detach().double().numpy().copy() for name, p in trained.items()}
    gradients = {name: torch.randn_like(p) for name, p in trained.items()}
    for name, p in trained.items():
        p.grad = gradients[name].clone()
    optimizer.step()
    for name, rate, decay in (
        ("student.trunk.encoder.model.embeddings.patch_embeddings.projection.weight", 2e-3 * 0.5**4 * 0.2, 0.1),
        ("student.trunk.encoder.model.embeddings.patch_embeddings.projection.bias", 2e-3 * 0.5**4 * 0.2, 0.0),
        ("student.trunk.encoder.model.encoder.layer.1.layer_scale1.lambda1", 2e-3 * 0.5**2, 0.0),
        ("student.trunk.encoder.model.layernorm.weight", 2e-3, 0.0),
        ("student.ibot_head.direction", 2e-3, 0.1),
    ):
        g = gradients[name].double().numpy()
        expected = before[name] * (1 - rate * decay) - rate * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(trained[name].detach().numpy(), expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_clipping_of_each_module_equals_torch_on_each() -> None:
    own, other = objective(DINOV2), objective(DINOV2)
    modules = parameters_by_module(own)
    assert list(modules) == ["trunk", "dino_head", "ibot_head"]
    assert sum(map(len, modules.values())) == sum(p.requires_grad for p in own.parameters())
    scales = {"trunk": 10.0, "dino_head": 1e-3, "ibot_head": 2.0}
    for (name, p), q in zip(own.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            p.grad = torch.randn_like(p) * scales[own.module_of(name)]
            q.grad = p.grad.clone()
    norms = clip_each(modules, 3.0)
    for name, part in (
        ("trunk", other.student.trunk), ("dino_head", other.student.dino_head), ("ibot_head", other.student.ibot_head),
    ):  # fmt: skip
        assert part is not None
        assert float(norms[name]) == float(clip_grad_norm_(part.parameters(), 3.0))
    for p, q in zip(own.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert float(norms["dino_head"]) < 3.0 < float(norms["ibot_head"])
    assert float(joint_norm(norms)) == pytest.approx(math.sqrt(sum(float(n) ** 2 for n in norms.values())))
    after = clip_each(modules, 3.0)
    assert float(after["trunk"]) == pytest.approx(3.0, rel=1e-4)


def test_other_objectives_are_clipped_by_part() -> None:
    class Two(Objective):
        def part_of(self, name: str) -> Any:
            return "text" if name.startswith("text") else "vision"

    two = Two()
    two.text, two.eye = nn.Linear(2, 2), nn.Linear(2, 3)
    found = {name: sum(p.numel() for p in parameters) for name, parameters in parameters_by_module(two).items()}
    assert found == {"text": 6, "vision": 9}


def pretraining(**fields: Any) -> PretrainConfig:
    data = DataConfig(sources=(SourceConfig(source="generated:shapes"),))
    return PretrainConfig.model_validate({"objective": "dinov2", "data": data, "steps": 10} | fields)


def test_the_rate_of_a_batch_and_the_final_rate() -> None:
    stage = pretraining(learning_rate=2e-4, base_batch_size=1024, batch_size=3072, final_learning_rate=1e-6).stage()
    assert stage.train["vision"] == pytest.approx(2e-4 * math.sqrt(3))
    assert stage.final_ratio * stage.train["vision"] == pytest.approx(1e-6)
    assert pretraining(learning_rate=2e-4).stage().train == {"vision": 2e-4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_learning_rate": 1e-6, "final_ratio": 0.1}, "final_ratio and final_learning_rate say the same"),
        ({"final_learning_rate": 1.0}, r"final_learning_rate: expected at most 0\.001, found 1"),
        ({"schedule_steps": 4, "warmup_steps": 4}, r"warmup_steps \(4\) must be below schedule_steps \(4\)"),
        ({"clip_per_module": True, "clip_norm": None}, "clip_per_module needs a clip_norm, found null"),
        ({"base_batch_size": 0}, "base_batch_size"),
    ],
)
def test_bad_settings_of_a_run(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        pretraining(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_decay": {"vision": 0.1}, "final_weight_decay": 0.2}, "expected one number under weight_decay"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"patch_embedding_factor": 0.0}, "patch_embedding_factor"),
        ({"final_weight_decay": -0.1}, "final_weight_decay"),
    ],
)
def test_bad_settings_of_an_optimiser(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimizerConfig(**fields)
