"""Images of one colour in place of real ones: a blind arm for models whose language model has nothing to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unclipped.data.sample import Sample, SampleGroup

if TYPE_CHECKING:
    from PIL import Image


def with_blank_images(item: Sample | SampleGroup, mean: Sequence[float]) -> Sample | SampleGroup:
    """`item` with each image replaced by one of its size in the colour `mean` (one or three values in 0..1).

    With the processor's mean that is an image of zeros after normalisation, up to rounding to 8 bits. The size is that
    of the image behind its other changes, so it is decoded all the same where the image is prepared.
    """
    if isinstance(item, SampleGroup):
        return SampleGroup(tuple(_blank_sample(sample, mean) for sample in item.samples))
    return _blank_sample(item, mean)


def _blank_sample(sample: Sample, mean: Sequence[float]) -> Sample:
    red, green, blue = (round(255 * value) for value in (tuple(mean) * 3 if len(mean) == 1 else mean))

    def blank(image: Image.Image) -> Image.Image:
        from PIL import Image

        return Image.new("RGB", image.size, (red, green, blue))

    return sample.with_images(part.changed(blank) for part in sample.images)
