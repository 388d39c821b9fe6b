"""Random choices for generated scenes, the same on every machine and Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, MutableSequence, Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice(random.Random):
    """A random stream named by a string.

    Every method goes through `random()`, the one method whose values Python promises to keep for a given seed.
    """

    def __init__(self, name: str) -> None:
        super().__init__(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "big"))

    def below(self, stop: int) -> int:
        """An integer in 0 … stop − 1."""
        return int(self.random() * stop)

    def between(self, bounds: tuple[int, int]) -> int:
        """An integer in low … high, both included."""
        return bounds[0] + int(self.random() * (bounds[1] - bounds[0] + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One item, all equally likely."""
        return items[int(self.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random() < probability

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One key, with probability proportional to its weight."""
        point = self.random() * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return next(key for key, weight in reversed(list(weights.items())) if weight > 0)  # rounding left a crumb

    def mixed(self, items: Sequence[T]) -> list[T]:
        """The items in a random order, as a new list."""
        result: MutableSequence[T] = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return list(result)

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in a random order."""
        return self.mixed(items)[:count]
