"""The fast path equals the slow definition: resize, x/255, (x - mean)/std, patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unclipped.core.errors import ImageError
from unclipped.images.config import ImageRule
from unclipped.images.part import ImagePart
from unclipped.images.patches import patchify, unpatchify
from unclipped.images.prepare import packed, prepare
from unclipped.images.rules import apply_rule, grid_of


def patches_of(image: Image.Image, rule: ImageRule) -> tuple[torch.Tensor, tuple[int, int, int]]:
    (piece,) = prepare(ImagePart(image), rule).pieces
    return piece.patches, piece.grid


def slow(image: Image.Image, rule: ImageRule) -> torch.Tensor:
    """The definition, in float64."""
    if rule.channels == 1:
        image = image.convert("L")
    pixels = np.asarray(apply_rule(image, rule)).astype(np.float64) / 255
    planes = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).expand(rule.channels, -1, -1)
    mean, std = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in (rule.mean, rule.std))
    return patchify((planes - mean) / std, rule.patch_size)


@st.composite
def rules(draw: st.DrawFn) -> ImageRule:
    channels = draw(st.sampled_from([1, 3]))
    patch_size = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    kind = draw(st.sampled_from(["native", "squash", "pad", "crop"]))
    numbers = st.lists(st.floats(0.2, 0.7), min_size=channels, max_size=channels)
    return ImageRule(
        rule=kind,
        size=None if kind == "native" else (patch_size[0] * 3, patch_size[1] * 4),
        patch_size=patch_size,
        max_tokens=draw(st.integers(1, 60)),
        channels=channels,
        mean=draw(numbers),
        std=draw(numbers),
        resample=draw(st.sampled_from(["bicubic", "bilinear"])),
        background=(12, 90, 200),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), rules())
def test_fast_path_equals_the_definition(height: int, width: int, grey: bool, rule: ImageRule) -> None:
    shape = (height, width) if grey else (height, width, 3)
    image = Image.fromarray(np.random.default_rng(height * 100 + width).integers(0, 256, shape, dtype=np.uint8))
    before = np.array(image)
    patches, grid = patches_of(image, rule)
    assert grid == (1, *grid_of(height, width, rule))
    assert patches.dtype == torch.float32
    assert patches.shape == (grid[1] * grid[2], rule.patch_values)
    torch.testing.assert_close(patches.double(), slow(image, rule), atol=1e-5, rtol=0)
    assert torch.equal(patches_of(image, rule)[0], patches)  # deterministic, and nothing cached was changed
    assert np.array_equal(np.array(image), before)


@pytest.mark.parametrize("kind", ["native", "squash", "pad", "crop"])
def test_a_grey_image_equals_its_rgb_copy(kind: str) -> None:
    rule = ImageRule(rule=kind, size=None if kind == "native" else 32, patch_size=8, mean=(0.1, 0.2, 0.3))
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 57), dtype=np.uint8))
    assert torch.equal(patches_of(grey, rule)[0], patches_of(grey.convert("RGB"), rule)[0])


def test_patches_go_back_to_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    patches, (_, h, w) = patches_of(Image.fromarray(pixels), ImageRule(patch_size=(16, 8)))
    planes = (unpatchify(patches, (h, w), (16, 8)) * 0.5 + 0.5) * 255
    assert np.array_equal(planes.round().byte().permute(1, 2, 0).numpy(), pixels)


def test_other_modes_and_sizes_are_not_packed() -> None:
    for image in (Image.new("RGBA", (16, 16)), Image.new("RGB", (16, 17))):
        with pytest.raises(ImageError, match="prepare it whole"):
            packed(image, ImageRule())
