"""Intervals of ratio figures: percentile bootstrap over clusters, paired differences, Wilson for right-or-wrong scores.

A figure is sum(numerators) / sum(denominators), which covers means (denominators 1) and micro-averaged error rates.
Items of one cluster (one image, one receipt) are drawn together, because they are not independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unclipped.core.errors import DataError
from unclipped.evaluation.figures import VALUE, Difference, Figure, Metric

_RESAMPLED_AT_ONCE = 4_000_000  # indices held in memory together, 32 MB
FEW_CLUSTERS = 30


def _sums(values: ArrayLike, weights: ArrayLike | None, clusters: Sequence[Hashable] | None) -> NDArray[np.float64]:
    """Per cluster the sums of numerators and denominators, (num_clusters, 2); without clusters each item is its own."""
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones_like(numerators) if weights is None else np.asarray(weights, dtype=np.float64)
    if numerators.ndim != 1 or numerators.shape != denominators.shape:
        raise DataError(f"expected one denominator a score, found shapes {numerators.shape} and {denominators.shape}")
    if not len(numerators):
        raise DataError("no scores: an interval needs at least one item")
    if denominators.min() <= 0.0:
        raise DataError("a score has a denominator that is not positive")
    pairs = np.stack([numerators, denominators], axis=1)  # (items, 2)
    if clusters is None:
        return pairs
    if len(clusters) != len(pairs):
        raise DataError(f"expected one cluster a score, found {len(clusters)} clusters and {len(pairs)} scores")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    sums = np.zeros((len(numbers), 2))
    np.add.at(sums, index, pairs)
    return sums


def _resampled_sums(sums: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Sums over `samples` draws with replacement of as many clusters as there are: (clusters, k) -> (samples, k)."""
    generator = np.random.default_rng(seed)
    clusters = len(sums)
    totals = np.empty((samples, sums.shape[1]))
    step = max(1, _RESAMPLED_AT_ONCE // clusters)
    for start in range(0, samples, step):
        drawn = generator.integers(0, clusters, size=(min(step, samples - start), clusters))
        for column in range(sums.shape[1]):
            totals[start : start + step, column] = sums[drawn, column].sum(axis=1)
    return totals


def _percentiles(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def bootstrap(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    metric: Metric = VALUE,
) -> Figure:
    """Percentile bootstrap of sum(values) / sum(weights), whole clusters drawn with replacement.

    values: (items,) numerators; weights: (items,) denominators, 1 when None; clusters: one label an item, None when
    every item stands alone. Raises DataError on no items, unequal lengths or a denominator that is not positive.
    """
    sums = _sums(values, weights, clusters)
    totals = _resampled_sums(sums, samples, seed)
    low, high = _percentiles(totals[:, 0] / totals[:, 1], confidence)
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    return Figure(value, low, high, len(np.asarray(values)), metric, len(sums), "bootstrap")


def wilson(successes: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share. Raises DataError when `count` is 0 or `successes` lies outside 0…count."""
    if count < 1 or not 0.0 <= successes <= count:
        raise DataError(f"Wilson's interval needs 0 <= successes <= count and count >= 1, found {successes} of {count}")
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    share = successes / count
    scale = 1.0 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z / scale * (share * (1.0 - share) / count + z * z / (4 * count * count)) ** 0.5
    # At 0 and at `count` one bound is the share itself; rounding must not put the share outside its interval.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def estimate(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    is_binary: bool,
    interval: Literal["auto", "bootstrap", "wilson"] = "auto",
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    metric: Metric = VALUE,
) -> Figure:
    """A figure with the interval asked for (see `EvaluationConfig.interval`).

    Wilson's interval counts clusters, not items: items of one cluster say one thing. Raises DataError when Wilson is
    asked for and the scores are not right-or-wrong.
    """
    sums = _sums(values, weights, clusters)
    numerators = np.asarray(values, dtype=np.float64)
    degenerate = bool(np.all(numerators == numerators[0])) or len(sums) < FEW_CLUSTERS
    if interval == "wilson" and not is_binary:
        raise DataError("interval: wilson is for right-or-wrong scores; use bootstrap for this scorer")
    if interval == "wilson" or (interval == "auto" and is_binary and degenerate):
        share = float(sums[:, 0].sum() / sums[:, 1].sum())
        low, high = wilson(share * len(sums), len(sums), confidence)
        return Figure(share, low, high, len(numerators), metric, len(sums), "wilson")
    return bootstrap(values, weights, clusters, samples=samples, confidence=confidence, seed=seed, metric=metric)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    weights: ArrayLike | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    second_weights: ArrayLike | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    metric: Metric = VALUE,
) -> Difference:
    """First minus second figure on the same items in the same order, the same clusters drawn for both.

    `second_weights` are the second set's denominators where they differ. Raises DataError when lengths differ.
    """
    if np.shape(first) != np.shape(second):
        raise DataError(f"a paired difference needs the same items, found {np.shape(first)} and {np.shape(second)}")
    one = _sums(first, weights, clusters)
    two = _sums(second, weights if second_weights is None else second_weights, clusters)
    totals = _resampled_sums(np.concatenate([one, two], axis=1), samples, seed)
    low, high = _percentiles(totals[:, 0] / totals[:, 1] - totals[:, 2] / totals[:, 3], confidence)
    value = float(one[:, 0].sum() / one[:, 1].sum() - two[:, 0].sum() / two[:, 1].sum())
    return Difference(value, low, high, len(np.asarray(first)), len(one), metric)
