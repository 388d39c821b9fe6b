"""Segmentation with a linear head: batch normalisation and a 1x1 convolution on frozen patch features.

Scores are upsampled (bilinear) to the mask; the figure is the mean over classes of intersection / union, both summed
over the whole data set first. A mean of each image's own figure is another number and is not computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from unclipped.core.errors import DataError, UsageError
from unclipped.data.generated.masks import class_mask
from unclipped.data.generated.registry import open_generated
from unclipped.data.generated.source import GeneratedSource
from unclipped.data.readers.folder import IMAGE_SUFFIXES
from unclipped.data.sample import ImagePart
from unclipped.data.sources import expanded
from unclipped.evaluation.intervals import Difference, Estimate
from unclipped.evaluation.probes.config import GENERATED_TEST, GENERATED_TRAIN, SegmentationConfig
from unclipped.evaluation.probes.linear import batches

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class SegmentedImage:
    """An image and the way to its mask, uint8 (height, width) of class numbers."""

    id: str
    image: ImagePart
    mask: Callable[[], Mask]


@dataclass(frozen=True)
class SegmentedSet:
    """Images with masks: to learn from and to be measured on."""

    name: str
    classes: tuple[str, ...]
    train: tuple[SegmentedImage, ...]
    test: tuple[SegmentedImage, ...]


def load_segmented(config: SegmentationConfig) -> SegmentedSet:
    """Both splits. Raises DataError for a missing split or mask, UsageError for a folder without named classes."""
    if config.source.startswith("generated:"):
        if config.classes:
            raise UsageError(f"segmentation.classes: {config.source} brings its own; leave it out")
        splits = [
            _drawn(config, config.train_split, config.train_limit or GENERATED_TRAIN),
            _drawn(config, config.test_split, config.test_limit or GENERATED_TEST),
        ]
        classes = ("background", *_generated(config, config.train_split).generator.kinds)
        return SegmentedSet(config.source, classes, splits[0], splits[1])
    if not 2 <= len(config.classes) <= 255:
        raise UsageError("segmentation.classes: name the classes 0, 1, … of the masks, at least two and at most 255")
    folder = Path(expanded(config.source, "segmentation"))
    splits = [
        _from_folder(folder / config.train_split, config, config.train_limit),
        _from_folder(folder / config.test_split, config, config.test_limit),
    ]
    return SegmentedSet(config.source, config.classes, splits[0], splits[1])


def _generated(config: SegmentationConfig, split: str) -> GeneratedSource:
    name = config.source.removeprefix("generated:")
    options = {"tasks": {"count": 1}, **config.options} if name == "shapes" else config.options
    source = open_generated(name, split, options, config.seed)
    if not source.generator.kinds or source.generator.as_text:
        raise UsageError(f"segmentation.source: {config.source} draws no image here, so it has no masks; take another")
    return source


def _drawn(config: SegmentationConfig, split: str, limit: int) -> tuple[SegmentedImage, ...]:
    """Images of a generated task, each class a kind of object; what covers half of a pixel has it."""
    source = _generated(config, split)
    kinds = source.generator.kinds
    samples = [source[index] for index in range(limit)]
    return tuple(
        SegmentedImage(sample.id, sample.images[0], lambda index=index: class_mask(source.scene(index), kinds))
        for index, sample in enumerate(samples)
    )


def _from_folder(folder: Path, config: SegmentationConfig, limit: int | None) -> tuple[SegmentedImage, ...]:
    if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise DataError(f"segmentation {folder}: expected the folders images and masks in it; check source and splits")
    files = sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)[:limit]
    if not files:
        raise DataError(f"segmentation {folder / 'images'}: no image in it")
    items = []
    for path in files:
        mask = folder / "masks" / f"{path.stem}.png"
        if not mask.is_file():
            raise DataError(f"segmentation {path}: no mask {mask}; add it or remove the image")
        items.append(SegmentedImage(path.name, ImagePart(str(path)), lambda mask=mask: read_mask(mask, config)))
    return tuple(items)


def read_mask(path: Path, config: SegmentationConfig) -> Mask:
    """The mask in a file of mode L or P. Raises DataError for another mode and for values that are no class."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise DataError(f"mask {path}: mode {image.mode}; expected one byte a pixel (L or P), its class number")
            mask = np.array(image, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"mask {path}: cannot be read ({error}); save it again as PNG") from None
    strange = np.unique(mask[(mask >= len(config.classes)) & (mask != config.ignore)])
    if len(strange):
        raise DataError(
            f"mask {path}: value {strange[0]} is no class (0 to {len(config.classes) - 1}) and not ignore "
            f"({config.ignore}); add the class or correct the mask"
        )
    return mask


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
    items: Sequence[SegmentedImage],
    grid: tuple[int, int],
    size: tuple[int, int],
    num_classes: int,
    config: SegmentationConfig,
) -> LinearSegmenter:
    """Train the head on patches (N, n, D); masks are brought to `size`, the encoder's (nearest pixel)."""
    masks = torch.stack([_resized(item.mask(), size) for item in items])  # (N, H, W) uint8
    if not bool((masks != config.ignore).any()):
        raise DataError(f"segmentation {config.source}: every pixel of the training masks is to be ignored")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = LinearSegmenter(patches.shape[-1], num_classes)
    optimiser = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    batch_size = min(config.batch_size, len(items))
    for step, index in enumerate(batches(len(items), batch_size, config.steps, config.seed)):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        target = masks[index].long()
        if not bool((target != config.ignore).any()):
            continue  # a batch of ignored pixels only has no mean loss
        scores = upsampled(head(patches[index], grid), size)
        loss = functional.cross_entropy(scores, target, ignore_index=config.ignore)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.eval()


def _resized(mask: Mask, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class Overlaps:
    """Per image and class, pixels of the intersection and of the union: two arrays (N, C)."""

    intersection: NDArray[np.int64]
    union: NDArray[np.int64]


@torch.no_grad()
def measure_overlaps(
    head: LinearSegmenter,
    patches: Tensor,
    items: Sequence[SegmentedImage],
    grid: tuple[int, int],
    num_classes: int,
    ignore: int,
) -> Overlaps:
    """Predict every image at its mask's own size and count."""
    rows = []
    for number, item in enumerate(items):
        mask = item.mask()
        scores = upsampled(head(patches[number : number + 1], grid), (mask.shape[0], mask.shape[1]))
        rows.append(confusion(scores[0].argmax(dim=0).numpy(), mask, num_classes, ignore))
    return overlaps_of(np.stack(rows))


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


def iou_estimate(overlaps: Overlaps, *, samples: int, confidence: float, seed: int) -> Estimate:
    """The data set's mean intersection over union, with a percentile bootstrap over images."""
    count = len(overlaps.union)
    draws = _resampled(overlaps, _draws(count, samples, seed))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(mean_iou(overlaps.intersection.sum(axis=0), overlaps.union.sum(axis=0)))
    return Estimate(value, float(low), float(high), count, count, "bootstrap")


def iou_difference(first: Overlaps, second: Overlaps, *, samples: int, confidence: float, seed: int) -> Difference:
    """First minus second on the same images, the same images drawn for both."""
    if first.union.shape != second.union.shape:
        raise DataError(f"a paired difference needs the same images, found {first.union.shape}, {second.union.shape}")
    count = len(first.union)
    drawn = _draws(count, samples, seed)
    draws = _resampled(first, drawn) - _resampled(second, drawn)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    values = [mean_iou(one.intersection.sum(axis=0), one.union.sum(axis=0)) for one in (first, second)]
    return Difference(float(values[0] - values[1]), float(low), float(high), count, count)
