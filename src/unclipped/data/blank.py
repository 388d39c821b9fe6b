"""Images of one colour in place of real ones: a blind arm for models whose language model has nothing to train."""

from __future__ import annotations

from collections.abc import Sequence

from unclipped.data.sample import ImagePart, Sample, SampleGroup


def with_blank_images(item: Sample | SampleGroup, mean: Sequence[float]) -> Sample | SampleGroup:
    """`item` with each image replaced by one of its size in the colour `mean` (one or three values in 0..1).

    With the processor's mean that is an image of zeros after normalisation, up to rounding to 8 bits. Raises ImageError
    when an image cannot be read.
    """
    if isinstance(item, SampleGroup):
        return SampleGroup(tuple(_blank_sample(sample, mean) for sample in item.samples))
    return _blank_sample(item, mean)


def _blank_sample(sample: Sample, mean: Sequence[float]) -> Sample:
    return sample.with_images(_blank(part, mean) for part in sample.images)


def _blank(part: ImagePart, mean: Sequence[float]) -> ImagePart:
    from PIL import Image

    from unclipped.images.decode import load_image

    image = load_image(part.source, name=part.label)
    red, green, blue = (round(255 * value) for value in (tuple(mean) * 3 if len(mean) == 1 else mean))
    return ImagePart(Image.new("RGB", image.size, (red, green, blue)), name=part.label)
