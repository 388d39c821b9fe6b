"""Resizing rules: budget never exceeded, aspect within its stated bound, named variants equal to their originals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from unclipped.core.errors import ImageError
from unclipped.images.config import ImageRule
from unclipped.images.rules import apply_rule, grid_of, target_size

sides = st.one_of(st.integers(1, 60), st.integers(1, 5000))
few = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def native_rules(draw: st.DrawFn) -> ImageRule:
    maximum = draw(st.integers(1, 1500))
    return ImageRule(
        patch_size=(draw(st.integers(1, 32)), draw(st.integers(1, 32))),
        merge=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        min_tokens=draw(st.one_of(st.just(1), st.integers(1, maximum))),
        max_tokens=maximum,
    )


def distortion(height: int, width: int, target: tuple[int, int]) -> float:
    """Factor, at least 1, by which one side is stretched against the other."""
    factor = (target[0] / height) / (target[1] / width)
    return max(factor, 1 / factor)


@few
@given(sides, sides, native_rules())
def test_native_keeps_the_budget_and_the_aspect(height: int, width: int, rule: ImageRule) -> None:
    target = target_size(height, width, rule)
    bh, bw = rule.block
    assert target[0] % bh == 0
    assert target[1] % bw == 0
    rows, columns = target[0] // bh, target[1] // bw
    assert 1 <= rows * columns <= rule.max_tokens
    assert grid_of(height, width, rule) == (rows * rule.merge[0], columns * rule.merge[1])
    assert target == target_size(height, width, rule)

    # The stated bound, from the ideal sides in blocks y and x.
    y, x = height / bh, width / bw
    if max(y / x, x / y) >= rule.max_tokens:
        assert (rows, columns) in {(1, rule.max_tokens), (rule.max_tokens, 1)}
        return
    scale = min(max(1, 1 / min(y, x), math.sqrt(rule.min_tokens / (y * x))), math.sqrt(rule.max_tokens / (y * x)))
    r = max(1, math.floor(min(y, x) * scale + 1e-9))
    bound = (r + 1) / r if rule.min_tokens == 1 else ((r + 1) / r) ** 2
    assert distortion(height, width, target) <= bound * (1 + 1e-6)


@few
@given(st.integers(1, 40), st.integers(1, 40), native_rules())
def test_native_leaves_fitting_images_alone(rows: int, columns: int, rule: ImageRule) -> None:
    height, width = rows * rule.block[0], columns * rule.block[1]
    if rule.min_tokens <= rows * columns <= rule.max_tokens:
        assert target_size(height, width, rule) == (height, width)


@few
@given(st.integers(20, 3000), st.integers(20, 3000), st.integers(4, 300))
def test_native_honours_the_minimum(height: int, width: int, minimum: int) -> None:
    rule = ImageRule(patch_size=14, merge=2, min_tokens=minimum, max_tokens=4 * minimum)
    target = target_size(height, width, rule)
    assert target[0] * target[1] // 784 >= minimum


def test_native_examples() -> None:
    rule = ImageRule(patch_size=14, merge=2, max_tokens=64)
    assert target_size(1, 1, rule) == (28, 28)  # one block at least
    assert target_size(1, 30, rule) == (28, 28 * 30)  # a strip is scaled up until its short side is one block
    assert target_size(1, 1000, rule) == (28, 28 * 64)  # … as far as the budget goes
    assert target_size(1000, 1, rule) == (28 * 64, 28)
    assert target_size(1000, 1000, rule) == (224, 224)
    assert target_size(140, 224, rule) == (140, 224)


@few
@given(sides, sides, st.integers(1, 4), st.integers(1, 40), st.integers(1, 20))
def test_fixed_height(height: int, width: int, rows: int, columns: int, minimum: int) -> None:
    rule = ImageRule(
        patch_size=(16, 8),
        merge=(1, 2),
        fixed_height=16 * rows,
        max_tokens=rows * columns,
        min_tokens=min(minimum, rows * columns),
    )
    target = target_size(height, width, rule)
    assert target[0] == 16 * rows
    assert target[1] % 16 == 0
    tokens = rows * target[1] // 16
    assert rule.min_tokens <= tokens <= rule.max_tokens
    ideal = width * target[0] / height
    if rule.min_tokens * 16 / rows <= ideal <= columns * 16 and ideal >= 16:
        assert abs(target[1] - ideal) <= 16


@few
@given(sides, sides, st.integers(1, 28), st.integers(1, 64), st.integers(64, 4000))
def test_qwen2_vl_arithmetic(height: int, width: int, block: int, minimum: int, maximum: int) -> None:
    rule = ImageRule(patch_size=block, native_variant="qwen2_vl", min_tokens=minimum, max_tokens=maximum)
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ImageError, match="aspects up to 200"):
            target_size(height, width, rule)
        return
    expected = smart_resize(height, width, block, minimum * block**2, maximum * block**2)
    if expected[0] * expected[1] > maximum * block**2:
        with pytest.raises(ImageError, match="over max_tokens"):
            target_size(height, width, rule)
    else:
        assert target_size(height, width, rule) == expected


@few
@given(sides, sides, st.integers(1, 32), st.integers(1, 2000))
def test_siglip2_arithmetic(height: int, width: int, patch: int, maximum: int) -> None:
    rule = ImageRule(patch_size=patch, native_variant="siglip2", max_tokens=maximum)
    target = target_size(height, width, rule)
    assert target == get_image_size_for_max_num_patches(height, width, patch, maximum)
    assert target[0] * target[1] // patch**2 <= maximum


def gradient(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pad_keeps_the_aspect_on_the_background() -> None:
    rule = ImageRule(rule="pad", size=(32, 64), patch_size=16, background=(7, 8, 9))
    padded = np.asarray(apply_rule(Image.new("RGB", (20, 20), (200, 100, 0)), rule))
    assert padded.shape == (32, 64, 3)
    assert (padded[:, 16:48] == (200, 100, 0)).all()
    assert (padded[:, :16] == (7, 8, 9)).all()
    assert (padded[:, 48:] == (7, 8, 9)).all()
    grey = apply_rule(Image.new("L", (20, 20), 50), rule)
    assert np.array_equal(np.asarray(grey)[0, 0], (7, 8, 9))
    one_channel = ImageRule(rule="pad", size=32, channels=1, background=(255, 255, 255))
    assert np.asarray(apply_rule(Image.new("L", (16, 4), 50), one_channel))[0, 0] == 255


@pytest.mark.parametrize(("height", "width"), [(300, 200), (217, 640), (224, 224), (50, 40), (1, 90)])
@pytest.mark.parametrize("shorter", [None, 256])
def test_crop_equals_the_resize_and_centre_crop_of_transformers(height: int, width: int, shorter: int | None) -> None:
    image = gradient(height, width)
    rule = ImageRule(rule="crop", size=224, patch_size=14, shorter_side=shorter)
    theirs = PilBackend(
        do_resize=True,
        size={"shortest_edge": shorter or 224},
        default_to_square=False,
        do_center_crop=True,
        crop_size={"height": 224, "width": 224},
        resample=3,
    )(image)["pixel_values"][0]
    assert np.array_equal(np.asarray(apply_rule(image, rule)).transpose(2, 0, 1), theirs)


def test_crop_of_another_shape_covers_it() -> None:
    rule = ImageRule(rule="crop", size=(32, 96), patch_size=16)
    for height, width in ((10, 10), (100, 50), (50, 400), (33, 97)):
        assert apply_rule(gradient(height, width), rule).size == (96, 32)
    with pytest.raises(ImageError, match="use rule pad or native"):
        apply_rule(Image.new("L", (1, 19_000)), rule)


def test_squash_and_strips() -> None:
    for name in ("squash", "pad"):
        rule = ImageRule(rule=name, size=(32, 48), patch_size=16)
        for height, width in ((1, 500), (500, 1), (1, 1), (32, 48)):
            assert apply_rule(gradient(height, width), rule).size == (48, 32)
    image = gradient(32, 48)
    assert apply_rule(image, ImageRule(rule="squash", size=(32, 48))) is image


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        target_size(0, 5, ImageRule())
