"""Mean and standard deviation of the pixels that the encoder will see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from unclipped.core.errors import DataError
from unclipped.data.sample import ImagePart, Sample, SampleGroup
from unclipped.data.sources import Source


def pixel_statistics(
    sources: Sequence[Source], rule: Any, count: int = 512, *, seed: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel on values in 0..1 over `count` training images after the resize of `rule`.

    sources: their images are sampled evenly, each finite source at places drawn with `seed`, an endless one from its
    start. rule: an `ImageRule`, or a processor that has one; its own mean and std play no part. Every pixel counts
    once, so large images weigh more, as they do in training. Raises DataError when the sources hold no image.
    """
    rule = getattr(getattr(rule, "image_processor", rule), "image_rule", rule)
    share = -(-count // max(1, len(sources)))
    return statistics_of_images(
        (part for source in sources for sample in _some(source, share, seed) for part in sample.images), rule
    )


def statistics_of_images(parts: Iterable[ImagePart], rule: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel on values in 0..1 over the pixels of `parts`, resized by `rule`."""
    from unclipped.images.prepare import pixels

    number = 0
    total = np.zeros(rule.channels)
    squares = np.zeros(rule.channels)
    for part in parts:
        values = pixels(part, rule).astype(np.float64).reshape(-1, rule.channels) / 255  # (pixels, channels)
        number += len(values)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    if number == 0:
        raise DataError("pixel statistics: the sources hold no image to measure and learn from; add images to the data")
    mean = total / number
    # A constant channel would divide by zero later; the smallest step of 8-bit values bounds it.
    std = np.sqrt(np.maximum(squares / number - mean**2, (1 / 255) ** 2))
    return tuple(map(float, mean)), tuple(map(float, std))


def _some(source: Source, count: int, seed: int) -> Iterable[Sample | SampleGroup]:
    if source.length is None:
        indices: Iterable[int] = range(count)
    else:
        indices = np.random.default_rng(seed).permutation(source.length)[:count]
    return (source[int(index)] for index in indices)
