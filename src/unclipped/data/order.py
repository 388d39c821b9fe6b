"""A shuffled order that keeps reads near each other, for sources that lie in long files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_WINDOWS_KEPT = 4


@dataclass(frozen=True, eq=False)
class Runs:
    """How the samples of a source lie in files, declared by a source as `runs` when its files should be read in turn.

    `bounds`: int64 (files + 1,), the first sample of each file, and the end. `window`: samples that are shuffled
    together.
    """

    bounds: np.ndarray
    window: int

    def limited(self, limit: int) -> Runs:
        """The runs of the first `limit` samples."""
        return Runs(np.minimum(self.bounds, limit), self.window)

    def selected(self, indices: np.ndarray) -> Runs | None:
        """The runs of the samples at `indices`; None when these do not rise, so that they no longer lie in runs."""
        if np.any(np.diff(indices) <= 0):
            return None
        return Runs(np.searchsorted(indices, self.bounds).astype(np.int64), self.window)

    def order(self, seed: Sequence[int]) -> WindowedOrder:
        """The order of one epoch: a permutation of all samples, a pure function of `seed`."""
        return WindowedOrder(self, seed)


class WindowedOrder:
    """Files in shuffled order, laid end to end and cut into windows; samples are shuffled inside each window.

    `order[i]` is the sample at place i of the epoch. It needs the order of the files and of the window around i, so an
    epoch of any length costs 8 bytes a file and 8 a sample of the windows in use, and may be entered anywhere.
    """

    def __init__(self, runs: Runs, seed: Sequence[int]) -> None:
        self.seed, self.window = list(seed), runs.window
        lengths = np.diff(runs.bounds)
        files = np.random.default_rng([*self.seed, 0]).permutation(len(lengths))
        self._first = runs.bounds[files]  # (files,): first sample of each file in this epoch's order
        self._start = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[files])])  # (files + 1,): its place
        self._inside = lru_cache(maxsize=_WINDOWS_KEPT)(self._window_permutation)

    def __len__(self) -> int:
        return int(self._start[-1])

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of an epoch of {len(self)}")
        window, within = divmod(place, self.window)
        listed = window * self.window + int(self._inside(window)[within])
        file = int(np.searchsorted(self._start, listed, side="right")) - 1  # the last that starts here: empty ones pass
        return int(self._first[file]) + listed - int(self._start[file])

    def _window_permutation(self, window: int) -> np.ndarray:
        size = min(self.window, len(self) - window * self.window)  # the last one may be short
        return np.random.default_rng([*self.seed, 1, window]).permutation(size)
