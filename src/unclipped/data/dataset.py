"""Draws of a mixture, encoded: what a data loader indexes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unclipped.data.encoding import Example, encode
from unclipped.data.mixture import Mixture


class ExampleDataset:
    """Encoded draws `start`, `start + 1`, … of a mixture; item i depends on seed and start + i alone.

    `size` is the number of draws (steps times batch size in training). The policy for bad samples covers reading,
    augmenting and encoding alike.
    """

    def __init__(
        self, mixture: Mixture, processor: Any, size: int, *, start: int = 0, max_length: int | None = None
    ) -> None:
        self.mixture, self.processor, self.size = mixture, processor, size
        self.start, self.max_length = start, max_length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(f"draw {index} out of {self.size}")
        return self.mixture.first_good(
            self.start + index, lambda item: encode(item, self.processor, max_length=self.max_length)
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self.size))
