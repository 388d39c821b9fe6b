"""Segmentation with a linear head: batch normalisation and a 1x1 convolution on frozen patch features.

Scores are upsampled (bilinear) to the mask; the figure is the mean over classes of intersection / union, both summed
over the whole data set first. A mean of each image's own figure is another number and is not computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from unclipped.audit.config import SegmentationConfig
from unclipped.audit.linear import batches
from unclipped.audit.masks import VOID, Mask, SegmentedImage
from unclipped.core.errors import DataError
from unclipped.evaluation.figures import MEAN_IOU, Difference, Figure


class LinearSegmenter(nn.Module):
    """(B, n, D) patch features on a grid -> class scores (B, C, h, w)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)
        nn.init.normal_(self.classify.weight, std=0.01)
        assert self.classify.bias is not None
        nn.init.zeros_(self.classify.bias)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        planes = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return self.classify(self.norm(planes))


def upsampled(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Class scores (B, C, h, w) at (height, width) px, bilinear, pixel centres aligned."""
    return functional.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def train_segmenter(
    patches: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    config: SegmentationConfig,
    device: torch.device | str = "cpu",
) -> LinearSegmenter:
    """Train the head on patches (N, n, D) and masks (N, H, W), uint8, at the encoder's size.

    Raises DataError when there is no pixel to learn from.
    """
    if not bool((masks != VOID).any()):
        raise DataError(f"segmentation {config.source}: every pixel of the training masks is to be ignored")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = LinearSegmenter(patches.shape[-1], num_classes).to(device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    size = (masks.shape[1], masks.shape[2])
    batch_size = min(config.batch_size, len(masks))
    for step, index in enumerate(batches(len(masks), batch_size, config.steps, config.seed)):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        target = masks[index].long()
        if not bool((target != VOID).any()):
            continue  # a batch of ignored pixels only has no mean loss
        scores = upsampled(head(patches[index].to(device), grid), size)
        loss = functional.cross_entropy(scores, target.to(device), ignore_index=VOID)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.eval()


@dataclass(frozen=True)
class Overlaps:
    """Per image and class, pixels of the intersection and of the union: two arrays (N, C)."""

    intersection: NDArray[np.int64]
    union: NDArray[np.int64]


@torch.no_grad()
def measure_overlaps(
    head: LinearSegmenter, patches: Tensor, items: Sequence[SegmentedImage], grid: tuple[int, int], num_classes: int
) -> Overlaps:
    """Predict every image at its mask's own size and count."""
    device = head.classify.weight.device
    rows = []
    for number, item in enumerate(items):
        mask = item.mask()
        scores = upsampled(head(patches[number : number + 1].to(device), grid), (mask.shape[0], mask.shape[1]))
        predicted = scores[0].argmax(dim=0).cpu().numpy()
        # One matrix at a time: those of many classes and images together would take gigabytes.
        rows.append(overlaps_of(confusion(predicted, mask, num_classes, VOID)[None]))
    return Overlaps(np.concatenate([row.intersection for row in rows]), np.concatenate([row.union for row in rows]))


def confusion(predicted: NDArray[np.integer], mask: Mask, num_classes: int, ignore: int) -> NDArray[np.int64]:
    """Counts (C, C) of pixels by class of the mask (rows) and predicted class (columns), ignored pixels left out."""
    counted = mask != ignore
    index = mask[counted].astype(np.int64) * num_classes + predicted[counted]
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def overlaps_of(matrices: NDArray[np.int64]) -> Overlaps:
    """From confusion matrices (N, C, C)."""
    intersection = np.diagonal(matrices, axis1=1, axis2=2)
    return Overlaps(intersection, matrices.sum(axis=1) + matrices.sum(axis=2) - intersection)


def mean_iou(intersection: NDArray[np.integer], union: NDArray[np.integer]) -> NDArray[np.float64]:
    """(…, C) sums over the data set -> mean over the classes that occur in masks or predictions, (…)."""
    occurs = union > 0
    ratio = np.where(occurs, intersection / np.maximum(union, 1), 0.0)
    return ratio.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def _draws(count: int, samples: int, seed: int) -> NDArray[np.int64]:
    """How often each image is drawn in each resample, (samples, N)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)


def _resampled(overlaps: Overlaps, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    return mean_iou(draws @ overlaps.intersection, draws @ overlaps.union)


def iou_estimate(overlaps: Overlaps, *, samples: int, confidence: float, seed: int) -> Figure:
    """The data set's mean intersection over union, with a percentile bootstrap over images."""
    count = len(overlaps.union)
    draws = _resampled(overlaps, _draws(count, samples, seed))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(mean_iou(overlaps.intersection.sum(axis=0), overlaps.union.sum(axis=0)))
    return Figure(value, float(low), float(high), count, MEAN_IOU, count, "bootstrap")


def iou_difference(first: Overlaps, second: Overlaps, *, samples: int, confidence: float, seed: int) -> Difference:
    """First minus second on the same images, the same images drawn for both."""
    if first.union.shape != second.union.shape:
        raise DataError(f"a paired difference needs the same images, found {first.union.shape}, {second.union.shape}")
    count = len(first.union)
    drawn = _draws(count, samples, seed)
    draws = _resampled(first, drawn) - _resampled(second, drawn)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    values = [mean_iou(one.intersection.sum(axis=0), one.union.sum(axis=0)) for one in (first, second)]
    return Difference(float(values[0] - values[1]), float(low), float(high), count, count, MEAN_IOU)
