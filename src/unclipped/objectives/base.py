"""What the trainer knows about an objective: a module whose forward returns a loss and its parts."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unclipped.core.registry import Registry

Batch = dict[str, Any]
Counts = dict[str, Tensor]


class Objective(nn.Module):
    """A model together with the loss it is trained on.

    `forward(**batch, counts=None)` returns `{"loss": scalar, "parts": {name: detached scalar}}`, with the same names
    for every batch.

    An objective whose loss is a mean over things that differ in number from batch to batch (tokens, samples) says in
    `count` how many there are. The trainer adds these up over accumulated micro-batches and processes and hands the
    sums to `forward` as `counts`, so that dividing by them makes many small batches equal one large batch. An
    objective that counts nothing returns the mean over its batch; the trainer averages such means.
    """

    needs: ClassVar[Literal["text", "images", "pairs"]]
    model: Any

    def count(self, batch: Batch) -> Counts:
        """Numbers of items that the loss of `batch` is divided by, as scalar tensors on the batch's device."""
        return {}

    def part_of(self, name: str) -> Literal["vision", "connector", "text"]:
        """Part of the model that the parameter `name` (as in `self.named_parameters()`) belongs to."""
        raise NotImplementedError(f"{type(self).__name__} does not say which part {name} belongs to")

    def module_of(self, name: str) -> str:
        """Sub-module of the parameter `name` where gradients are clipped module by module; its part by default."""
        return self.part_of(name)

    def schedules(self) -> dict[str, float]:
        """Values of the coming step that the objective changes with the steps, by name, for the metrics."""
        return {}

    def forward(self, *, counts: Counts | None = None, **batch: Any) -> dict[str, Any]:
        """Loss and parts of one micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def num_samples(self, batch: Batch) -> int:
        """Samples in a micro-batch, for the rate that is reported."""
        first = next(value for value in batch.values() if isinstance(value, Tensor))
        return first.shape[0]

    def num_tokens(self, batch: Batch) -> int:
        """Tokens in a micro-batch without padding, for the rate that is reported."""
        raise NotImplementedError(f"{type(self).__name__} does not count tokens")

    def after_step(self) -> None:
        """Called after each optimiser step, for moving averages and the like."""

    def health(self, batch: Batch) -> dict[str, float]:
        """Signs of collapse on a micro-batch, by name, for the metrics (see `objectives/health.py`); none by default.

        Called now and then in evaluation mode, without gradients, random state restored afterwards; it must change no
        buffer. Not called when the objective is sharded over processes.
        """
        return {}


def normaliser(counts: Counts | None, own: Counts, name: str) -> Tensor:
    """The number to divide a sum by: over the whole batch when the trainer gives it, else this micro-batch's own.

    Never below one, so that a batch without such items gives zero and not NaN.
    """
    count = own[name] if counts is None else counts[name]
    return torch.clamp(count, min=1)


OBJECTIVES: Registry[type[Objective]] = Registry("objective")
