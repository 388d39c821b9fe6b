"""The order of samples: batch k of a stage is a pure function of (seed, stage, k), whatever came before.

Therefore resuming is starting at another k, and any number of processes sees the same global batches.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unclipped.core.errors import UsageError
from unclipped.training.config import StageConfig


class Examples(Protocol):
    """An endless sequence of training examples; both methods are pure functions of the indices. Picklable."""

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The collated examples at `indices`: tensors by name, and `sample_ids`, a list of strings."""
        ...

    def lengths(self, indices: Sequence[int]) -> Sequence[int]:
        """Length of each example, in tokens or in anything that grows with them."""
        ...


def check_shares(stage: StageConfig, world_size: int) -> int:
    """Micro-batches of all processes that make up a batch of the stage. Raises UsageError when it does not divide."""
    shares = world_size * stage.gradient_accumulation
    if stage.batch_size % shares:
        raise UsageError(
            f"stage '{stage.name}': batch_size {stage.batch_size} does not divide into {world_size} process(es) × "
            f"gradient_accumulation {stage.gradient_accumulation}; use a multiple of {shares}"
        )
    return shares


class StageBatches(Dataset[dict[str, Any]]):
    """Micro-batches of one process in one stage: item m is micro-batch m mod A of step m div A (A: accumulation)."""

    def __init__(
        self,
        examples: Examples,
        stage: StageConfig,
        *,
        seed: int,
        length_grouping: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        """Raises UsageError when a batch does not divide into processes and micro-batches."""
        shares = check_shares(stage, world_size)
        self.examples, self.seed, self.length_grouping = examples, seed, length_grouping
        self.batch_size, self.accumulation = stage.batch_size, stage.gradient_accumulation
        self.micro_size = stage.batch_size // shares
        self.world_size, self.rank, self.steps = world_size, rank, stage.steps

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def global_indices(self, step: int) -> list[int]:
        """Indices of the examples in the batch of all processes at `step`."""
        if not self.length_grouping:
            return list(range(step * self.batch_size, (step + 1) * self.batch_size))
        window, place = divmod(step, self.length_grouping)
        return self._window(window)[place]

    def _window(self, window: int) -> list[list[int]]:
        if not hasattr(self, "_cached_window"):
            self._cached_window = lru_cache(maxsize=2)(self._sorted_window)
        return self._cached_window(window)

    def _sorted_window(self, window: int) -> list[list[int]]:
        """Cut a window sorted by length (ties by index) into batches, then shuffle the batches."""
        size = self.length_grouping * self.batch_size
        indices = np.arange(window * size, (window + 1) * size)
        lengths = np.asarray(self.examples.lengths(indices.tolist()))
        indices = indices[np.argsort(lengths, kind="stable")]
        batches = indices.reshape(self.length_grouping, self.batch_size)
        order = np.random.default_rng([self.seed, window]).permutation(self.length_grouping)
        return batches[order].tolist()

    def indices(self, item: int) -> list[int]:
        """Indices of the examples in micro-batch `item` of this process."""
        step, micro = divmod(item, self.accumulation)
        start = (micro * self.world_size + self.rank) * self.micro_size
        return self.global_indices(step)[start : start + self.micro_size]

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.examples.batch(self.indices(item))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_cached_window"}


def _obey_main_process(worker: int) -> None:
    """Signals from a terminal or a scheduler reach every process; the main process decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it tells the sender, which a handler does not learn
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(main: int) -> None:
    """End this process at a SIGTERM of the process `main`, or of any when `main` is gone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main and os.getppid() == main:
        pass
    os._exit(0)


class StageLoader:
    """Iterates over the micro-batches of a stage from a step on; the number of steps already done is asked at start."""

    def __init__(
        self, batches: StageBatches, finished_steps: Callable[[], int], *, workers: int, pin_memory: bool
    ) -> None:
        self.batches, self.finished_steps, self.workers, self.pin_memory = batches, finished_steps, workers, pin_memory

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = self.finished_steps() * self.batches.accumulation
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(start, len(self.batches)),
                num_workers=self.workers,
                pin_memory=self.pin_memory,
                # Its own generator: the loader would otherwise draw from the global one, whose state a resumed run
                # must find as the unbroken run left it.
                generator=torch.Generator().manual_seed(0),
                worker_init_fn=_obey_main_process if self.workers else None,
            )
        )
