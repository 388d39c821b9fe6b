"""The blank arm: images of one colour, of the size of the real ones."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from unclipped.data.blank import with_blank_images
from unclipped.data.sample import ImagePart, Sample, SampleGroup
from unclipped.images.config import ImageRule
from unclipped.images.prepare import prepare


@pytest.mark.parametrize("mean", [(0.85, 0.4, 0.1), (0.5,)])
def test_a_blank_image_is_zero_to_the_encoder_and_keeps_its_grid(mean: tuple[float, ...]) -> None:
    picture = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    sample = Sample.qa("a", [ImagePart(picture), ImagePart(picture.resize((16, 8)))], "what", "red")
    rule = ImageRule(patch_size=8, mean=mean, std=(1.0,) * len(mean), channels=len(mean))  # type: ignore[arg-type]
    for item in (with_blank_images(sample, mean), with_blank_images(SampleGroup((sample, sample)), mean)):
        for before, after in zip(sample.images, item.images, strict=True):
            patches, grid = prepare(after, rule).patches, prepare(after, rule).grids
            assert grid == prepare(before, rule).grids
            assert torch.as_tensor(patches).abs().max() <= 0.5 / 255 + 1e-6
    assert with_blank_images(sample, mean).question == sample.question  # type: ignore[union-attr]
