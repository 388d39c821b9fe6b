"""Random views: every operation against a second one in plain float64, windows, determinism, and what is refused.

Tolerances are levels of uint8. Colour operations compute in float32 and round once, so they may differ by one level,
where the exact value lies next to a half; so may resampling, whose weights Pillow holds as integers.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from unclipped.core.errors import DataError
from unclipped.data import image_ops
from unclipped.data.views import MultiCrop, SingleView, recoloured
from unclipped.data.views_config import ColourConfig, ViewConfig, dinov2_colours

LEVEL = 1
WEIGHTS = np.array([0.299, 0.587, 0.114])


def photograph(height: int = 19, width: int = 23, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth, with black, white, grey and pure colours in it: uint8 (H, W, C)."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, channels)).astype(np.float64)
    pixels = (pixels + np.roll(pixels, 1, axis=0) + np.roll(pixels, 1, axis=1)) / 3
    pixels[0, 0], pixels[0, 1], pixels[1, 1] = 0, 255, 77
    pixels[2, :channels, :] = 255 * np.eye(channels)
    return pixels.astype(np.uint8)


def through(operation: Any, pixels: np.ndarray, *arguments: Any) -> np.ndarray:
    return image_ops.to_pixels(operation(image_ops.to_planes(pixels), *arguments))


def assert_within_a_level(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(float) - np.rint(expected.clip(0, 255))).max() <= LEVEL


# A second implementation, image by image in float64, (H, W, C) on 0..255


def grey_of(pixels: np.ndarray) -> np.ndarray:
    values = pixels.astype(np.float64)
    return values if values.shape[2] == 1 else (values @ WEIGHTS)[..., None]


def blend(pixels: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    return (factor * pixels.astype(np.float64) + (1 - factor) * other).clip(0, 255)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(pixels, 0.0, factor)


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(pixels, grey_of(pixels).mean(), factor)


def saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(pixels, grey_of(pixels), factor) if pixels.shape[2] == 3 else pixels.astype(np.float64)


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    turned = pixels.astype(np.float64)
    if pixels.shape[2] == 3:
        for place in itertools.product(*map(range, pixels.shape[:2])):
            h, s, v = colorsys.rgb_to_hsv(*(turned[place] / 255))
            turned[place] = np.array(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)) * 255
    return turned


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.broadcast_to(grey_of(pixels), pixels.shape)


def gaussian_blur(pixels: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Each value as a weighted sum over its whole neighbourhood, not row by row."""
    radius = min(radius, min(pixels.shape[:2]) - 1)
    padded = np.pad(pixels.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = np.outer(taps, taps) / np.outer(taps, taps).sum()
    side = 2 * radius + 1
    return np.array(
        [
            [(padded[y : y + side, x : x + side] * kernel[..., None]).sum((0, 1)) for x in range(pixels.shape[1])]
            for y in range(pixels.shape[0])
        ]
    )


def solarise(pixels: np.ndarray, threshold: int) -> np.ndarray:
    return np.array([255 - int(v) if v >= threshold else int(v) for v in pixels.ravel()]).reshape(pixels.shape)


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resized_columns(values: np.ndarray, start: int, end: int, size: int) -> np.ndarray:
    """(H, W, C) → (H, size, C): the columns start..end, rounded to whole levels as they are between two passes."""
    scale = (end - start) / size
    wide = max(scale, 1.0)
    columns = []
    for place in range(size):
        centre = start + (place + 0.5) * scale
        low, high = max(0, int(centre - 2 * wide + 0.5)), min(values.shape[1], int(centre + 2 * wide + 0.5))
        weights = np.array([cubic((x + 0.5 - centre) / wide) for x in range(low, high)])
        columns.append(np.tensordot(weights / weights.sum(), values[:, low:high], axes=(0, 1)))
    return np.rint(np.stack(columns, axis=1).clip(0, 255))


def resized_crop(pixels: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    left, top, right, bottom = box
    rows = resized_columns(pixels.astype(np.float64), left, right, size)
    return resized_columns(rows.swapaxes(0, 1), top, bottom, size).swapaxes(0, 1)


# Operations


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.37, 2.0])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_equal_a_second_implementation(name: str, factor: float, channels: int) -> None:
    pixels = photograph(channels=channels)
    assert_within_a_level(through(getattr(image_ops, name), pixels, factor), globals()[name](pixels, factor))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.034, 0.25, 0.5])
def test_hue_equals_that_of_the_standard_library(turn: float, channels: int) -> None:
    pixels = photograph(channels=channels)
    assert_within_a_level(through(image_ops.hue, pixels, turn), hue(pixels, turn))


def test_hue_over_many_blocks_of_rows() -> None:
    pixels = photograph(300, 120)
    found = through(image_ops.hue, pixels, 0.2)
    for start in (0, 130, 270):  # rows stand alone
        assert np.array_equal(found[start : start + 30], through(image_ops.hue, pixels[start : start + 30], 0.2))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_equals_a_second_implementation(channels: int) -> None:
    pixels = photograph(channels=channels)
    assert_within_a_level(through(image_ops.grey, pixels), grey(pixels))


@pytest.mark.parametrize(("sigma", "radius"), [(0.1, 1), (0.7, 2), (2.0, 4), (3.0, 50)])
@pytest.mark.parametrize("shape", [(19, 23, 3), (5, 40, 1), (2, 2, 3)])
def test_blur_equals_a_second_implementation(shape: tuple[int, int, int], sigma: float, radius: int) -> None:
    pixels = photograph(*shape) if shape[0] > 2 else np.arange(12, dtype=np.uint8).reshape(shape) * 20
    assert_within_a_level(through(image_ops.gaussian_blur, pixels, sigma, radius), gaussian_blur(pixels, sigma, radius))


def test_blur_over_many_blocks_of_rows() -> None:
    pixels = photograph(300, 120)
    found = through(image_ops.gaussian_blur, pixels, 1.5, 3)
    assert_within_a_level(found[133:143, 50:60], gaussian_blur(pixels[123:153, 40:70], 1.5, 3)[10:20, 10:20])


@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarisation_equals_a_second_implementation(threshold: int) -> None:
    pixels = photograph()
    assert np.array_equal(image_ops.solarise(pixels, threshold), solarise(pixels, threshold))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", [(0, 0, 23, 19), (3, 2, 20, 19), (10, 10, 14, 12), (22, 18, 23, 19)])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_resized_windows_equal_a_second_implementation(box: Any, size: int, channels: int) -> None:
    pixels = photograph(channels=channels)
    found = image_ops.resized_crop(image_ops.to_image(pixels), box, size)
    assert_within_a_level(found, resized_crop(pixels, box, size))


def test_a_chain_of_changes_rounds_once() -> None:
    """Jitter in the order that is drawn, then grey and blur, then solarisation."""
    pixels = photograph()
    config = ColourConfig(jitter=1, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1, blur_sigma=(1, 2))
    second = {0: brightness, 1: contrast, 2: saturation, 3: hue}
    spreads, orders = (0.4, 0.4, 0.2, 0.1), set()
    for seed in range(12):
        found = recoloured(pixels, config, np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        has_grey = bool(generator.random(4)[1] < config.grey)
        draws, order = generator.uniform(-1, 1, 4), tuple(generator.permutation(4).tolist())
        expected = pixels.astype(np.float64)
        for which in order:
            expected = second[which](expected, (which < 3) + spreads[which] * draws[which])
        expected = grey(expected) if has_grey else expected
        expected = gaussian_blur(expected, generator.uniform(1, 2), 4)
        assert_within_a_level(found, expected)
        orders.add(order)
    assert len(orders) > 6


def test_rates_are_those_of_the_configuration() -> None:
    pixels = np.tile(np.array([[[200, 30, 60]]], dtype=np.uint8), (4, 4, 1))
    still = {"jitter": 0, "grey": 0, "blur": 0}
    changed = {
        "grey": lambda seen: bool((seen == seen[..., :1]).all()),
        "solarise": lambda seen: bool(seen[0, 0, 0] == 55),
        "jitter": lambda seen: not np.array_equal(seen, pixels),
    }
    for name, has_changed in changed.items():
        config = ColourConfig(**(still | {name: 0.3}))
        hits = [has_changed(recoloured(pixels, config, np.random.default_rng(seed))) for seed in range(400)]
        assert 0.2 < np.mean(hits) < 0.4, name


# Windows


BOUNDS = st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(lambda pair: (min(pair), max(pair)))
ASPECTS = st.tuples(st.floats(0.2, 5.0), st.floats(0.2, 5.0)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(8, 400),
    width=st.integers(8, 400),
    scale=BOUNDS,
    aspect=ASPECTS,
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_lie_inside_and_keep_their_bounds(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], seed: int
) -> None:
    left, top, right, bottom = image_ops.random_box(height, width, scale, aspect, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    # Sides are rounded to whole pixels: bounds hold for some window within half a pixel of this one.
    assert (w - 0.5) / (h + 0.5) <= aspect[1] * (1 + 1e-9)
    assert (w + 0.5) / max(h - 0.5, 1e-9) >= aspect[0] * (1 - 1e-9)
    is_centre = abs(2 * left + w - width) <= 1 and abs(2 * top + h - height) <= 1
    in_scale = (w - 0.5) * (h - 0.5) <= scale[1] * height * width and (w + 0.5) * (h + 0.5) >= scale[0] * height * width
    assert in_scale or is_centre  # the centre is what is left when ten draws did not fit


@pytest.mark.parametrize(
    ("height", "width", "aspect", "expected"),
    [
        (100, 10, (3 / 4, 4 / 3), (0, 43, 10, 56)),
        (10, 100, (3 / 4, 4 / 3), (43, 0, 56, 10)),
        (30, 30, (1.3, 1.3), (0, 3, 30, 26)),
        (30, 40, (0.5, 2.0), (0, 0, 40, 30)),
    ],
)
def test_the_centre_is_taken_when_no_window_fits(
    height: int, width: int, aspect: tuple[float, float], expected: tuple[int, ...]
) -> None:
    share = 2.0 if aspect == (0.5, 2.0) else 1.0  # twice the image's area fits nowhere, whatever the aspect
    for seed in range(5):
        generator = np.random.default_rng(seed)
        assert image_ops.random_box(height, width, (share, share), aspect, generator) == expected


def test_area_is_even_and_aspect_even_in_its_logarithm() -> None:
    areas, aspects = [], []
    for seed in range(2000):
        left, top, right, bottom = image_ops.random_box(
            500, 500, (0.1, 0.4), (0.5, 2.0), np.random.default_rng([seed, 7])
        )
        areas.append((right - left) * (bottom - top) / 250_000)
        aspects.append(math.log((right - left) / (bottom - top)) / math.log(2))
    for values, low, high in ((areas, 0.1, 0.4), (aspects, -1.0, 1.0)):
        counts, _ = np.histogram(values, bins=4, range=(low, high))
        assert counts.min() > 420, counts


# Views


@pytest.mark.parametrize("channels", [1, 3])
def test_two_global_views_then_local_ones(channels: int) -> None:
    pixels = photograph(40, 31, channels)
    crop = MultiCrop(32, 16, 3)
    views = crop(pixels, np.random.default_rng(1))
    assert [view.shape for view in views] == [(32, 32, channels)] * 2 + [(16, 16, channels)] * 3
    assert all(view.dtype == np.uint8 and view.flags.c_contiguous for view in views)
    assert not np.array_equal(views[0], views[1])


def test_views_depend_on_the_generator_alone() -> None:
    pixels = photograph(40, 31)
    before = pixels.copy()
    crop, single = MultiCrop(32, 16, 3), SingleView(ViewConfig(size=24, colours=ColourConfig()))
    np.random.seed(0)
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    for seed in range(4):
        runs = [[*crop(pixels, g), single(pixels, g)] for g in (np.random.default_rng(seed) for _ in range(2))]
        assert all(np.array_equal(one, other) for one, other in zip(*runs, strict=True))
    image = Image.fromarray(pixels)
    for one, other in zip(crop(pixels, np.random.default_rng(3)), crop(image, np.random.default_rng(3)), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(pixels, before)
    assert np.array_equal(np.random.get_state()[1], state)


def test_a_single_view_is_a_window_that_may_be_mirrored() -> None:
    pixels = photograph(40, 31)
    config = ViewConfig(size=24)
    mirrored = 0
    for seed in range(60):
        found = SingleView(config)(pixels, np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        box = image_ops.random_box(40, 31, config.scale, config.aspect, generator)
        plain = image_ops.resized_crop(Image.fromarray(pixels), box, 24)
        mirrored += np.array_equal(found, plain[:, ::-1])
        assert np.array_equal(found, plain[:, ::-1]) or np.array_equal(found, plain)
    assert 18 < mirrored < 42
    whole = SingleView(ViewConfig(size=31, scale=(1, 1), aspect=(31 / 40, 31 / 40), mirror=0))
    assert whole(pixels, np.random.default_rng(0)).shape == (31, 31, 3)


def test_blur_keeps_its_share_of_the_side() -> None:
    assert [c.blur_sigma for c in dinov2_colours()] == [(0.1, 2.0)] * 3
    assert dinov2_colours(96)[2].blur_sigma == pytest.approx((0.1 * 96 / 224, 2 * 96 / 224))
    assert [c.blur for c in dinov2_colours()] == [1.0, 0.1, 0.5]
    assert [c.solarise for c in dinov2_colours()] == [0.0, 0.2, 0.0]


def test_small_images_are_enlarged_unless_strict() -> None:
    small = photograph(9, 7)
    views = MultiCrop(32, 16, 1)(small, np.random.default_rng(0))
    assert [view.shape[0] for view in views] == [32, 32, 16]
    with pytest.raises(DataError, match=r"at least 32×32 px, found 9×7.*strict: false"):
        MultiCrop(32, 16, 1, strict=True)(small, np.random.default_rng(0))
    assert SingleView(ViewConfig(size=7, strict=True))(small, np.random.default_rng(0)).shape == (7, 7, 3)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((1, 9, 3), dtype=np.uint8), r"at least 2×2 px, found 1×9"),
        (np.zeros((0, 9, 3), dtype=np.uint8), r"at least 2×2 px, found 0×9"),
        (np.zeros((9, 9), dtype=np.uint8), r"expected pixels \(height, width, 1 or 3\) of uint8, found \(9, 9\)"),
        (np.zeros((9, 9, 4), dtype=np.uint8), r"found \(9, 9, 4\) of uint8; convert"),
        (np.zeros((9, 9, 3)), r"of float64; convert"),
        (Image.new("RGBA", (9, 9)), r"mode L or RGB, found RGBA; convert"),
    ],
)
def test_what_is_no_image_is_refused(pixels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SingleView(ViewConfig(size=8))(pixels, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViewConfig(size=8, scale=(0.5, 0.1)), r"scale: expected the smaller bound first.*swap"),
        (lambda: ViewConfig(size=8, aspect=(2.0, 1.0)), r"aspect: expected the smaller bound first"),
        (lambda: ColourConfig(blur_sigma=(2.0, 1.0)), r"blur_sigma: expected the smaller bound first"),
        (lambda: ViewConfig(size=8, scale=(0.5, 1.5)), "less than or equal to 1"),
        (lambda: ColourConfig(hue=0.7), r"less than or equal to 0\.5"),
        (lambda: ColourConfig(jitter=1.2), "less than or equal to 1"),
        (lambda: ViewConfig(size=8, colour=None), "Extra inputs"),
        (lambda: MultiCrop(0, 8, 1), "greater than 0"),
    ],
)
def test_bad_configurations_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()
