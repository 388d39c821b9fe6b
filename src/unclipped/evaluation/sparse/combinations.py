"""What a search chooses among: candidates measured in every place, and combinations of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unclipped.attention.parts import PerHead, PerLayer
from unclipped.attention.patterns import Full, Pattern


@dataclass(frozen=True, eq=False)
class Measured:
    """Candidates on the prompts that choose: mean recovered mass and density in each place.

    A place is a key head of a layer that can run patterns.
    """

    patterns: tuple[Pattern, ...]
    layers: tuple[int, ...]
    mass: np.ndarray
    """(candidates, layers, Hkv): mean over the query heads of a group and over prompts."""
    oracle: np.ndarray
    """The same for as many blocks chosen by true attention, and (random) at random."""
    random: np.ndarray
    density: np.ndarray
    """(candidates, layers, Hkv)"""


@dataclass(frozen=True)
class Combination:
    """A candidate for every place. `choice[layer][head]` numbers candidates; one head stands for all."""

    least_mass: float
    choice: tuple[tuple[int, ...], ...]


def combine(measured: Measured, least_mass: float, *, per_head: bool) -> Combination:
    """In each place the cheapest candidate whose recovered mass is at least `least_mass`."""
    mass, density = measured.mass, measured.density
    if not per_head:
        mass, density = mass.mean(axis=2, keepdims=True), density.mean(axis=2, keepdims=True)
    allowed = mass >= min(least_mass, 1.0) - 1e-6
    for number, pattern in enumerate(measured.patterns):
        allowed[number] |= isinstance(pattern, Full)
    choice = np.where(allowed, density, np.inf).argmin(axis=0)  # (layers, heads or 1)
    return Combination(least_mass, tuple(tuple(int(number) for number in row) for row in choice))


def pattern_for(combination: Combination, measured: Measured, depth: int) -> Pattern:
    """A combination as one pattern; layers that cannot run patterns are `full`."""
    own: dict[int, Pattern] = {}
    for layer, row in zip(measured.layers, combination.choice, strict=True):
        parts = tuple(measured.patterns[number] for number in row)
        own[layer] = parts[0] if len(set(parts)) == 1 else PerHead(parts)
    listed = tuple(own.get(layer, Full()) for layer in range(depth))
    return listed[0] if len(set(listed)) == 1 else PerLayer(listed)


def of_combination(values: np.ndarray, combination: Combination) -> np.ndarray:
    """(candidates, layers, Hkv) at the chosen candidates: (layers, Hkv)."""
    heads = values.shape[2]
    chosen = np.array([row * heads if len(row) == 1 else row for row in combination.choice])  # (layers, Hkv)
    return np.take_along_axis(values, chosen[None], axis=0)[0]
