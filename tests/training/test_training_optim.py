"""The joined optimiser: which weights Muon gets, equality with torch's own classes, state that survives a reload."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training_support import RandomTokens, assert_equal_weights, small_language_model

from unclipped.core.errors import UsageError
from unclipped.objectives.language_model import LanguageModelObjective
from unclipped.training.config import OptimizerConfig, StageConfig
from unclipped.training.muon import Muon
from unclipped.training.optim import (
    Course,
    JoinedOptimizer,
    build_optimizer,
    build_scheduler,
    hidden_matrices,
    learning_rates,
)

STAGE = StageConfig(train={"text": 1e-2}, steps=20, warmup_steps=2)


def text(_: str) -> str:
    return "text"


def step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    batch = RandomTokens().batch(range(4 * index, 4 * index + 4))
    LanguageModelObjective(model)(**batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_gets_the_linear_layers_of_blocks_and_nothing_else() -> None:
    model = small_language_model(tie_word_embeddings=False)
    names = hidden_matrices(model, text)
    assert names == {
        name
        for name, parameter in model.named_parameters()
        if ".layers." in name and name.endswith("_proj.weight") and parameter.ndim == 2
    }
    assert len(names) == 14


def test_connector_matrices_go_to_muon_only_when_asked() -> None:
    model = nn.ModuleDict({"connector": nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))})
    stage = StageConfig(train={"connector": 1e-3}, steps=1)
    kinds = []
    for parts in (("connector",), ("text",)):
        config = OptimizerConfig(name="muon", muon_parts=parts)
        groups = build_optimizer(model, stage, config, lambda _: "connector").param_groups
        kinds.append({(group["optimizer"], len(group["params"])) for group in groups})
    assert kinds == [{("muon", 2), ("adamw", 2)}, {("adamw", 2)}]


def test_adamw_equals_torch_with_decay_on_matrices_only() -> None:
    ours, theirs = small_language_model(), small_language_model()
    config = OptimizerConfig(weight_decay={"text": 0.1})
    mine = build_optimizer(ours, STAGE, config, text)
    parameters = list(theirs.parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for index in range(3):
        step(ours, mine, index)
        step(theirs, reference, index)
    assert_equal_weights(ours, theirs)


def test_joined_equals_muon_and_adamw_apart() -> None:
    ours, theirs = small_language_model(), small_language_model()
    config = OptimizerConfig(name="muon")
    mine = build_optimizer(ours, STAGE, config, text)
    names = hidden_matrices(theirs, text)
    matrices = [p for name, p in theirs.named_parameters() if name in names]
    others = [p for name, p in theirs.named_parameters() if name not in names]
    apart = [
        Muon(matrices, lr=1e-2, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True),
    ]
    for index in range(3):
        step(ours, mine, index)
        LanguageModelObjective(theirs)(**RandomTokens().batch(range(4 * index, 4 * index + 4)))["loss"].backward()
        for optimizer in apart:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_weights(ours, theirs)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_reloaded_state_continues_bit_for_bit(name: str) -> None:
    config = OptimizerConfig(name=name)
    model = small_language_model()
    optimizer = build_optimizer(model, STAGE, config, text)
    scheduler = build_scheduler(optimizer, STAGE)
    for index in range(3):
        step(model, optimizer, index)
        scheduler.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))

    other = small_language_model(seed=1)
    other.load_state_dict(saved[0])
    second = build_optimizer(other, STAGE, config, text)
    second_scheduler = build_scheduler(second, STAGE)
    second.load_state_dict(saved[1])
    second_scheduler.load_state_dict(saved[2])
    for index in range(3, 6):
        step(model, optimizer, index)
        scheduler.step()
        step(other, second, index)
        second_scheduler.step()
    assert_equal_weights(model, other)
    assert learning_rates(optimizer) == learning_rates(second)


def test_a_scheduler_and_a_copy_reach_the_inner_optimisers() -> None:
    model = small_language_model()
    optimizer = build_optimizer(model, STAGE, OptimizerConfig(name="muon", muon_scale={"text": 0.5}), text)
    assert learning_rates(optimizer) == {"text": 1e-2, "text.muon": 5e-3}
    build_scheduler(optimizer, STAGE)
    assert learning_rates(optimizer)["text.muon"] == pytest.approx(5e-3 / 3)
    clone = copy.deepcopy(optimizer)
    for joined in (optimizer, clone):
        inner = [group for part in joined._inner for group in part.param_groups]
        assert {id(group) for group in inner} == {id(group) for group in joined.param_groups}
        assert all(part.state is joined.state for part in joined._inner)


def test_groups_must_name_a_known_optimiser() -> None:
    with pytest.raises(UsageError, match="optimizer 'sgd'"):
        JoinedOptimizer([{"params": [nn.Parameter(torch.zeros(1))], "optimizer": "sgd", "part": "text"}])


def test_a_part_without_parameters_is_refused() -> None:
    stage = StageConfig(name="joint", train={"text": 1e-3, "vision": 1e-3}, steps=1)
    with pytest.raises(UsageError, match="stage 'joint': the model has no part 'vision'"):
        build_optimizer(small_language_model(), stage, OptimizerConfig(), text)


def test_courses() -> None:
    stage = StageConfig(train={"text": 1.0}, steps=10, warmup_steps=4, schedule="linear", final_ratio=0.1)
    rates = [Course(stage)(s) for s in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[10] == pytest.approx(0.1)
    cosine = [Course(stage.model_copy(update={"schedule": "cosine"}))(s) for s in range(11)]
    assert cosine[7] == pytest.approx(0.55)
    assert sorted(cosine[4:], reverse=True) == cosine[4:]
    constant = Course(stage.model_copy(update={"schedule": "constant"}))
    assert [constant(s) for s in (4, 9, 10)] == [1.0, 1.0, 1.0]
