"""Health of an encoder: measures against NumPy, the detector on hand-made collapses, colours of patches, no traces."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unclipped.core.errors import UnclippedError
from unclipped.objectives.health import (
    CollapseDetector,
    assignment_health,
    effective_rank,
    feature_health,
    feature_spread,
    patch_colours,
    undisturbed,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank_by_hand(features: np.ndarray, centred: bool) -> float:
    """From the eigenvalues of the Gram matrix, not from a singular value decomposition."""
    matrix = features.astype(np.float64)
    matrix = matrix - matrix.mean(0) if centred else matrix
    values = np.sqrt(np.linalg.eigvalsh(matrix @ matrix.T).clip(0))
    shares = values[values > 1e-9 * values.max()] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(6, 20), (30, 4), (5, 5), (2, 1)])
def test_effective_rank_equals_one_by_hand(shape: tuple[int, int], centred: bool) -> None:
    features = drawn(*shape) + 1.5
    expected = rank_by_hand(features.numpy(), centred)
    assert effective_rank(features, centred=centred) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_counts_equal_directions() -> None:
    for number in (1, 3, 7):
        assert effective_rank(torch.eye(10)[:number] * 4, centred=False) == pytest.approx(number)
    assert effective_rank(torch.outer(torch.arange(9.0), torch.ones(5))) == pytest.approx(1.0)
    assert effective_rank(torch.full((300, 40), 5.3)) == 0.0
    assert effective_rank(torch.zeros(4, 3)) == 0.0


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(2, 12), width=st.integers(1, 12), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_rank_is_bounded_and_blind_to_scale_and_rotation(rows: int, width: int, scale: float, seed: int) -> None:
    features = drawn(rows, width, seed=seed).double()
    rank = effective_rank(features)
    assert 1 - 1e-9 <= rank <= min(rows - 1, width) + 1e-9
    rotation = torch.linalg.qr(drawn(width, width, seed=seed + 1).double()).Q
    assert effective_rank(scale * features @ rotation + 2.0) == pytest.approx(rank, rel=1e-6)


def test_spread_is_one_for_all_directions_and_zero_for_one() -> None:
    assert feature_spread(drawn(4000, 16)) == pytest.approx(1.0, abs=0.02)
    assert feature_spread(torch.ones(8, 16) * torch.arange(1, 9)[:, None]) == pytest.approx(0.0, abs=1e-9)
    unit = drawn(9, 5).numpy().astype(np.float64)
    unit /= np.sqrt((unit**2).sum(1, keepdims=True))
    by_hand = np.sqrt(((unit - unit.mean(0)) ** 2).mean(0)).mean() * math.sqrt(5)
    assert feature_spread(drawn(9, 5)) == pytest.approx(by_hand)


def test_entropy_and_use_of_prototypes() -> None:
    assert assignment_health(torch.full((4, 10), 0.1)) == pytest.approx({"teacher_entropy": 1.0, "prototypes": 10.0})
    assert assignment_health(torch.eye(10)[:5]) == pytest.approx({"teacher_entropy": 0.0, "prototypes": 5.0})
    assert assignment_health(torch.eye(10)[[3, 3, 3]]) == pytest.approx({"teacher_entropy": 0.0, "prototypes": 1.0})
    assert assignment_health(torch.ones(3, 1))["teacher_entropy"] == 0.0
    rows = torch.softmax(drawn(6, 9) * 2, dim=1)
    p, mean = rows.double().numpy(), rows.double().numpy().mean(0)
    assert assignment_health(rows) == pytest.approx(
        {
            "teacher_entropy": -(p * np.log(p)).sum(1).mean() / math.log(9),
            "prototypes": np.exp(-(mean * np.log(mean)).sum()),
        }
    )


@pytest.mark.parametrize("measure", [effective_rank, feature_spread, assignment_health, feature_health])
def test_values_that_are_not_finite_are_an_error(measure: Any) -> None:
    values = torch.ones(3, 4)
    values[1, 2], values[2, 0] = math.nan, math.inf
    with pytest.raises(UnclippedError, match="2 of 12 values are not finite; lower the learning rate"):
        measure(values)


HEALTHY = {"rank": 20.0, "spread": 0.6, "images": 64.0}


@pytest.mark.parametrize(
    ("health", "message"),
    [
        ({"spread": 1e-3}, r"nearly constant \(spread 0\.001.*too high a learning rate"),
        ({"rank": 1.2}, r"effective rank 1\.2\); likely cause: too high a learning rate"),
        ({"rank": 1.2, "images": 8.0}, r"only 8 images in a micro-batch; raise batch_size"),
        ({"rank": 1.2, "teacher_entropy": 0.999, "prototypes": 60.0}, "same probability; lower teacher_temperature"),
        ({"spread": 0.0, "teacher_entropy": 0.01, "prototypes": 1.01}, "one prototype takes everything.*sinkhorn"),
        ({"spread": 0.0, "teacher_entropy": 0.4, "prototypes": 9.0}, "raise teacher_momentum, or lower learning_rate"),
    ],
)
def test_a_collapse_is_said_once_with_its_cause(health: dict[str, float], message: str) -> None:
    detector, collapsed = CollapseDetector(), HEALTHY | health
    assert detector.check(HEALTHY) == []
    assert detector.check(collapsed) == []  # once may be chance, or fresh weights
    (warning,) = detector.check(collapsed)
    assert re.search(message, warning), warning
    assert detector.check(collapsed) == []
    assert detector.check(HEALTHY) == []


def test_what_is_healthy_or_not_measured_is_not_judged() -> None:
    detector = CollapseDetector()
    for health in ({}, HEALTHY, {"loss": 0.0}, HEALTHY | {"rank": 1.0, "images": 3.0}):
        assert detector.check(health) == []
        assert detector.check(health) == []
    for health in (HEALTHY | {"rank": 1.0}, HEALTHY) * 3:  # never twice in a row
        assert detector.check(health) == []


def test_targets_that_are_even_are_said_although_features_are_healthy() -> None:
    detector = CollapseDetector()
    even, sorted_ = (HEALTHY | {"teacher_entropy": entropy, "prototypes": 900.0} for entropy in (0.98, 0.4))
    assert detector.check(even) == []
    (warning,) = detector.check(even)
    assert "entropy 0.98 of the most there can be" in warning
    assert "lower teacher_temperature or learning_rate" in warning
    assert detector.check(even) == []
    assert all(CollapseDetector().check(sorted_) == [] for _ in range(3))


def test_real_features_that_collapse_are_found() -> None:
    detector = CollapseDetector()
    healthy, constant = drawn(32, 16), torch.ones(32, 16) + 1e-4 * drawn(32, 16)
    line = torch.outer(drawn(32), drawn(16)) + 1e-3 * drawn(32, 16, seed=3)
    assert [detector.check(feature_health(healthy)) for _ in range(3)] == [[], [], []]
    assert "constant" in [detector.check(feature_health(constant)) for _ in range(2)][1][0]
    assert "one direction" in [detector.check(feature_health(line)) for _ in range(2)][1][0]


def test_patch_colours_equal_components_by_hand() -> None:
    features = drawn(2, 12, 5) * torch.tensor([5.0, 3.0, 2.0, 0.3, 0.1])
    found = patch_colours(features, (3, 4))
    assert found.shape == (2, 3, 4, 3)
    assert found.dtype == np.uint8
    rows = features.numpy().astype(np.float64).reshape(24, 5)
    left, _, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for channel in range(3):
        sign = np.sign(right[channel][np.abs(right[channel]).argmax()])
        values = left[:, channel] * sign
        expected = 255 * (values - values.min()) / (values.max() - values.min())
        assert np.abs(found[..., channel].reshape(-1) - expected).max() <= 0.5 + 1e-6


def test_patch_colours_are_the_same_each_time_and_blind_to_scale() -> None:
    features = drawn(2, 12, 8)
    assert np.array_equal(patch_colours(features, (3, 4)), patch_colours(features.clone(), (3, 4)))
    assert np.array_equal(patch_colours(features, (3, 4)), patch_colours(features * 4 + 1, (3, 4)))


def test_patch_colours_without_variance_are_grey() -> None:
    assert (patch_colours(torch.full((1, 4, 6), 3.3), (2, 2)) == 128).all()
    one = patch_colours(torch.arange(4.0)[None, :, None] * torch.ones(6), (2, 2))
    assert (one[..., 1:] == 128).all()
    assert one[0, :, :, 0].reshape(-1).tolist() == [0, 85, 170, 255]
    assert (patch_colours(drawn(1, 4, 2), (2, 2))[..., 2] == 128).all()
    with pytest.raises(UnclippedError, match="a grid of 2×3 holds no 4 patches"):
        patch_colours(drawn(1, 4, 2), (2, 3))


def test_undisturbed_leaves_no_trace() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module.train()
    module[0].eval()  # a part that was in evaluation mode stays there
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in module.state_dict().items()}
    with undisturbed(module, torch.device("cpu")):
        assert not any(part.training for part in module.modules())
        assert not module(torch.randn(8, 4)).requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in module] == [False, True, True]
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
    with pytest.raises(ZeroDivisionError), undisturbed(module, torch.device("cpu")):
        raise ZeroDivisionError
    assert module.training
