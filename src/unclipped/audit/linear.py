"""Linear heads on frozen features: a grid of learning rates and inputs, trained together as one tensor.

The protocol of DINOv2 (arXiv 2304.07193): inputs are the pooled features of the last block or of the last four, with or
without the mean patch; stochastic gradient descent with a cosine schedule; the head that is best on held-out images is
reported. Differences: features are standardised with the training images' mean and deviation, so that one grid of
learning rates serves features of any scale, and heads start at zero, where nothing depends on a draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclipped.audit.config import LinearConfig


@dataclass(frozen=True)
class Head:
    """One point of the grid."""

    learning_rate: float
    blocks: int
    mean_patch: bool

    @property
    def name(self) -> str:
        """Text form for tables."""
        inputs = "last block" if self.blocks == 1 else f"last {self.blocks} blocks"
        return f"{inputs}{' + mean patch' if self.mean_patch else ''}, learning rate {self.learning_rate:g}"


def grid_of_heads(config: LinearConfig, num_blocks: int, has_mean_patch: bool) -> list[Head]:
    """The heads to train on features of `num_blocks` blocks; points that would be doubles are left out."""
    blocks = sorted({min(count, num_blocks) for count in config.blocks})
    means = [False] if not has_mean_patch else list(config.mean_patch)
    return [Head(rate, count, mean) for count in blocks for mean in means for rate in config.learning_rates]


def side_by_side(pooled: Tensor, mean_patch: Tensor | None) -> Tensor:
    """pooled (N, blocks, D), the last block first, and mean_patch (N, D) -> (N, blocks·D [+ D])."""
    flat = pooled.flatten(1)
    return flat if mean_patch is None else torch.cat([flat, mean_patch], dim=1)


def columns_of(head: Head, width: int, total: int) -> Tensor:
    """bool (total,): the columns of `side_by_side` that a head reads; `width` is that of one block."""
    columns = torch.zeros(total, dtype=torch.bool)
    columns[: head.blocks * width] = True
    if head.mean_patch:
        columns[-width:] = True
    return columns


@dataclass(frozen=True)
class Standardiser:
    """Mean and deviation of each feature over the training images."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardiser:
        """From (N, F). A feature that is constant becomes zero."""
        mean = features.mean(dim=0)
        deviation = features.std(dim=0, correction=0)
        tiny = 1e-6 * deviation.max().clamp_min(1e-12)
        return cls(mean, torch.where(deviation > tiny, 1 / deviation.clamp_min(tiny), torch.zeros_like(deviation)))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices (batch_size,) of each step: one permutation after the other, no image left out between them."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def train_heads(
    features: Tensor, labels: Tensor, columns: Tensor, rates: Sequence[float], num_classes: int, config: LinearConfig
) -> tuple[Tensor, Tensor]:
    """Train all heads in one pass over the images: -> weight (H, C, F), bias (H, C).

    features (N, F), standardised; labels (N,); columns bool (H, F): what each head reads; rates (H,): its learning
    rate for a batch of 256. Heads share batches and nothing else, so each ends as if it had been trained alone. Weights
    of columns that a head does not read stay zero.
    """
    num_heads, width = columns.shape
    batch_size = min(config.batch_size, len(features))
    weight = features.new_zeros(num_heads, num_classes, width)
    bias = features.new_zeros(num_heads, num_classes)
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    reads = columns.to(features)[:, None]  # (H, 1, F)
    step_size = torch.tensor(rates, dtype=features.dtype, device=features.device)[:, None] * (
        batch_size / 256
    )  # (H, 1)
    for step, index in enumerate(batches(len(features), batch_size, config.steps, config.seed)):
        x, y = features[index], labels[index]
        error = head_logits(x, weight, bias).softmax(dim=-1)  # (B, H, C)
        error.scatter_add_(2, y[:, None, None].expand(-1, num_heads, 1), -torch.ones_like(error[..., :1]))
        error /= batch_size  # the gradient of the mean cross-entropy with respect to the logits
        gradient = (error.flatten(1).T @ x).view_as(weight) * reads
        weight_speed.mul_(config.momentum).add_(gradient)
        bias_speed.mul_(config.momentum).add_(error.sum(dim=0))
        now = step_size * (0.5 * (1 + math.cos(math.pi * step / config.steps)))
        weight -= now[:, :, None] * weight_speed
        bias -= now * bias_speed
    return weight, bias


def head_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """features (B, F), weight (H, C, F), bias (H, C) -> (B, H, C)."""
    return (features @ weight.flatten(0, 1).T).view(len(features), *bias.shape) + bias


@dataclass(frozen=True)
class LinearOutcome:
    """Accuracy of every head on the development part, the best head, and its classes on the test images."""

    development: dict[Head, float]
    best: Head
    predictions: Tensor


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    development: Tensor,
    development_labels: Tensor,
    test: Tensor,
    heads: Sequence[Head],
    block_width: int,
    num_classes: int,
    config: LinearConfig,
) -> LinearOutcome:
    """Train the heads on `train`, choose on `development`, predict on `test`; features as of `side_by_side`.

    Of equally good heads the first one is taken, that with fewer inputs and the smaller learning rate.
    """
    standardise = Standardiser.of(train)
    columns = torch.stack([columns_of(head, block_width, train.shape[1]) for head in heads])
    rates = [head.learning_rate for head in heads]
    weight, bias = train_heads(standardise(train), train_labels, columns.to(train.device), rates, num_classes, config)
    chosen = head_logits(standardise(development), weight, bias).argmax(dim=-1)  # (N, H)
    right = (chosen == development_labels[:, None]).double().mean(dim=0).tolist()
    best = max(range(len(heads)), key=lambda number: right[number])
    predictions = head_logits(standardise(test), weight[best : best + 1], bias[best : best + 1])[:, 0].argmax(dim=-1)
    return LinearOutcome(dict(zip(heads, right, strict=True)), heads[best], predictions)
