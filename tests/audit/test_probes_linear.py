"""Heads trained together: each ends as if trained alone, by the framework's own layer and optimiser."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unclipped.audit.config import LinearConfig
from unclipped.audit.linear import (
    Head,
    Standardiser,
    batches,
    columns_of,
    grid_of_heads,
    linear_probe,
    side_by_side,
    train_heads,
)

CONFIG = LinearConfig(learning_rates=(0.01, 1.0), steps=30, batch_size=16)


def problem(count: int = 40, blocks: int = 4, width: int = 3, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Random features (N, blocks·width + width) in float64 and labels."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, (blocks + 1) * width, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, classes, (count,), generator=generator)


def by_hand(features: Tensor, labels: Tensor, head: Head, width: int, classes: int) -> nn.Linear:
    """One head: nn.Linear on its own columns, SGD with momentum, a cosine schedule, the same batches."""
    inputs = features[:, columns_of(head, width, features.shape[1])]
    layer = nn.Linear(inputs.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    rate = head.learning_rate * CONFIG.batch_size / 256
    optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=CONFIG.momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / CONFIG.steps))
    )
    for index in batches(len(features), CONFIG.batch_size, CONFIG.steps, CONFIG.seed):
        optimiser.zero_grad()
        nn.functional.cross_entropy(layer(inputs[index]), labels[index]).backward()
        optimiser.step()
        schedule.step()
    return layer


def test_together_equals_alone_and_by_hand() -> None:
    features, labels = problem()
    heads = grid_of_heads(CONFIG, 4, True)
    assert len(heads) == 2 * 2 * 2
    columns = torch.stack([columns_of(head, 3, features.shape[1]) for head in heads])
    rates = [head.learning_rate for head in heads]
    weight, bias = train_heads(features, labels, columns, rates, 3, CONFIG)
    for number, head in enumerate(heads):
        layer = by_hand(features, labels, head, 3, 3)
        torch.testing.assert_close(weight[number][:, columns[number]], layer.weight.detach())
        torch.testing.assert_close(bias[number], layer.bias.detach())
        assert not weight[number][:, ~columns[number]].any(), "a head reads only its own columns"
        alone, _ = train_heads(features, labels, columns[number : number + 1], rates[number : number + 1], 3, CONFIG)
        torch.testing.assert_close(weight[number], alone[0])


def test_a_separable_problem_is_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    centres = torch.eye(3) * 0.01  # far smaller than a learning rate for unit features would suit
    pooled = (centres[labels] + 0.001 * torch.randn(90, 3, generator=generator))[:, None]
    features = side_by_side(torch.cat([pooled, torch.randn(90, 3, 3, generator=generator)], dim=1), None)
    config = LinearConfig(steps=200, batch_size=32)
    heads = grid_of_heads(config, 4, False)
    outcome = linear_probe(
        features[:45], labels[:45], features[45:60], labels[45:60], features[60:], heads, 3, 3, config
    )
    assert (outcome.predictions == labels[60:]).all()
    assert outcome.development[outcome.best] == 1.0
    assert outcome.best.blocks == 1, "of equally good heads the one with fewer inputs"
    assert set(outcome.development) == set(heads)


def test_choice_is_made_on_the_development_part_alone() -> None:
    features, labels = problem(60, blocks=1)
    heads = grid_of_heads(CONFIG, 1, True)
    arguments = (features[:30], labels[:30], features[30:45], labels[30:45])
    one = linear_probe(*arguments, features[45:], heads, 3, 3, CONFIG)
    two = linear_probe(*arguments, features[45:] * -3, heads, 3, 3, CONFIG)
    assert (one.best, one.development) == (two.best, two.development)


def test_the_grid_leaves_out_doubles() -> None:
    config = LinearConfig(learning_rates=(0.1,))
    assert [head.blocks for head in grid_of_heads(config, 1, False)] == [1]
    assert [(head.blocks, head.mean_patch) for head in grid_of_heads(config, 2, True)] == [
        (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    assert grid_of_heads(config, 4, True)[-1].name == "last 4 blocks + mean patch, learning rate 0.1"


def test_standardised_features() -> None:
    features = torch.randn(200, 4) * torch.tensor([1e-3, 1.0, 100.0, 0.0]) + 5
    found = Standardiser.of(features)(features)
    torch.testing.assert_close(found[:, :3].std(dim=0, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert not found[:, 3].any(), "a constant feature says nothing"


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 20), batch=st.integers(1, 25), steps=st.integers(1, 12))
def test_every_image_once_a_round(count: int, batch: int, steps: int) -> None:
    order = torch.cat(list(batches(count, batch, steps, seed=3))).tolist()
    assert len(order) == batch * steps
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))


@pytest.mark.parametrize("field", ["learning_rates", "blocks", "mean_patch"])
def test_an_empty_grid(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected at least one value"):
        LinearConfig(**{field: ()})
