"""Intervals: known cases, coverage, clusters, pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from unclipped.core.errors import DataError
from unclipped.evaluation.intervals import bootstrap, estimate, paired_difference, wilson


def test_bootstrap_of_a_mean_matches_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert (found.count, found.clusters, found.method) == (400, 400, "bootstrap")


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_coverage_is_near_nominal() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        found = bootstrap(generator.random(60) < 0.6, samples=400, seed=trial)
        inside += found.low <= 0.6 <= found.high
    assert 0.89 <= inside / 200 <= 0.99


def test_items_of_a_cluster_widen_the_interval() -> None:
    scenes = (np.random.default_rng(0).random(100) < 0.5).astype(float)
    values, clusters = np.repeat(scenes, 10), np.repeat(np.arange(100), 10)
    alone, together = bootstrap(values), bootstrap(values, clusters=list(clusters))
    assert together.value == alone.value
    # Ten copies of each scene say no more than one: the width is that of 100 items.
    assert together.high - together.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    assert together.high - together.low > 2.5 * (alone.high - alone.low)
    assert (together.count, together.clusters) == (1000, 100)


def test_clusters_of_one_equal_items_alone() -> None:
    values = np.random.default_rng(0).random(40)
    assert bootstrap(values, clusters=[f"c{i}" for i in range(40)]) == bootstrap(values)


def test_ratio_figures_are_micro_averages() -> None:
    edits, lengths = np.array([0.0, 5.0, 1.0]), np.array([90.0, 5.0, 5.0])
    found = bootstrap(edits, lengths)
    assert found.value == pytest.approx(0.06)
    assert found.low <= 0.06 <= found.high


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (3, 10), (10, 10), (77, 400)])
def test_wilson_equals_scipy(successes: int, count: int) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson(successes, count) == pytest.approx((expected.low, expected.high))


def test_auto_leaves_the_bootstrap_where_it_degenerates() -> None:
    perfect = estimate(np.ones(50), is_binary=True)
    assert perfect.method == "wilson"
    assert perfect.low == pytest.approx(wilson(50, 50)[0])
    assert perfect.high == 1.0
    assert estimate([1, 0] * 10, is_binary=True).method == "wilson"
    assert estimate([1, 0] * 50, is_binary=True).method == "bootstrap"
    assert estimate([1, 0] * 50, is_binary=True, interval="wilson").method == "wilson"
    assert estimate(np.zeros(50), is_binary=False).method == "bootstrap"
    # All right in 40 scenes: the interval is that of 40 observations, however many questions each scene has.
    clustered = estimate(np.ones(400), clusters=list(np.repeat(np.arange(40), 10)), is_binary=True)
    assert clustered.low == pytest.approx(wilson(40, 40)[0])


def test_paired_difference_is_narrower_than_unpaired() -> None:
    generator = np.random.default_rng(0)
    second = (generator.random(500) < 0.5).astype(float)
    first = np.maximum(second, generator.random(500) < 0.1)
    found = paired_difference(first, second)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.low <= found.value <= found.high
    assert found.excludes_zero
    alone = bootstrap(first)
    assert found.high - found.low < (alone.high - alone.low)


def test_a_set_against_itself_differs_by_nothing() -> None:
    values = np.random.default_rng(0).random(50)
    found = paired_difference(values, values, clusters=[i // 5 for i in range(50)])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.excludes_zero


def test_paired_difference_of_ratios() -> None:
    found = paired_difference([1, 0], [4, 4], [10, 10])
    assert found.value == pytest.approx(-0.35)
    found = paired_difference([1, 0], [4, 4], [10, 10], second_weights=[5, 5])
    assert found.value == pytest.approx(-0.75)


def test_many_clusters_are_resampled_in_blocks() -> None:
    values = np.random.default_rng(0).random(9000)
    assert bootstrap(values, samples=600).value == pytest.approx(values.mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([]), "no scores"),
        (lambda: bootstrap([1, 2], [1]), "one denominator a score"),
        (lambda: bootstrap([1, 2], [1, 0]), "not positive"),
        (lambda: bootstrap([1, 2], clusters=["a"]), "one cluster a score"),
        (lambda: paired_difference([1, 2], [1]), "same items"),
        (lambda: wilson(3, 2), "successes <= count"),
        (lambda: wilson(0, 0), "successes <= count"),
        (lambda: estimate([0.5, 1], is_binary=False, interval="wilson"), "right-or-wrong"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()
