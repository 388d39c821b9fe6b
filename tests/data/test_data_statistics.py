"""Pixel statistics equal those computed over all pixels at once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from support.tiny_models import tiny_image
from unclipped.core.errors import DataError
from unclipped.data.sample import ImagePart, Sample
from unclipped.data.statistics import pixel_statistics
from unclipped.images.config import ImageRule


class Pictures:
    """Images of fixed noise of several sizes, or none."""

    name = "pictures"

    def __init__(self, length: int | None, images: bool = True) -> None:
        self.length, self.images = length, images

    def __getitem__(self, index: int) -> Sample:
        picture = ImagePart(tiny_image(16, 8 * (1 + index % 3), offset=index))
        return Sample.qa(str(index), [picture] if self.images else [], "q", "a")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("length", [6, None])
def test_mean_and_std_are_those_of_all_pixels(channels: int, length: int | None) -> None:
    rule = ImageRule(patch_size=8, channels=channels)
    source = Pictures(length)
    mean, std = pixel_statistics([source], rule, 6)
    mode = "L" if channels == 1 else "RGB"
    images = [source[index].images[0].source.convert(mode) for index in range(6)]  # type: ignore[union-attr]
    values = np.concatenate([np.asarray(image, np.float64).reshape(-1, channels) for image in images]) / 255
    assert mean == pytest.approx(values.mean(axis=0))
    assert std == pytest.approx(values.std(axis=0))


def test_a_constant_channel_has_a_spread_to_divide_by() -> None:
    class Black(Pictures):
        def __getitem__(self, index: int) -> Sample:
            return Sample.qa("a", [Image.new("RGB", (8, 8))], "q", "a")

    mean, std = pixel_statistics([Black(1)], ImageRule(patch_size=8), 1)
    assert mean == (0, 0, 0)
    assert min(std) > 0


def test_sources_without_images_are_refused() -> None:
    with pytest.raises(DataError, match="no image"):
        pixel_statistics([Pictures(2, images=False)], ImageRule(patch_size=8), 4)
