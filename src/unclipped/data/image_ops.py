"""Single operations on images, as augmentation puts them together. Pillow resamples, NumPy does the rest.

Colour operations work on *planes*: float32 (C, H, W) on the scale 0..255, C 1 or 3. They change `planes` in place where
they can and return them, clip to 0..255, and do not round: a chain of them rounds once, in `to_pixels`. What colour
means for a single channel (saturation, hue, grey) leaves it as it is. Factors and weights are those that torchvision
and Pillow use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from unclipped.core.errors import DataError

Box = tuple[int, int, int, int]
"""A window in pixels: left, top, right, bottom, the latter two outside."""

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601)."""
_TRIES = 10
_BLOCK = 16_384  # px


def to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 → a Pillow image in mode L or RGB. Raises DataError for another type or shape."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise DataError(
            f"views: expected pixels (height, width, 1 or 3) of uint8, found {pixels.shape} of {pixels.dtype}; "
            "convert the image to RGB or grey first"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_planes(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 → (C, H, W) float32 on 0..255."""
    return pixels.transpose(2, 0, 1).astype(np.float32, order="C")


def to_pixels(planes: np.ndarray) -> np.ndarray:
    """(C, H, W) float32 on 0..255, rounded to (H, W, C) uint8."""
    channels, height, width = planes.shape
    pixels = np.empty((height, width, channels), dtype=np.uint8)
    rounded = np.rint(planes, out=planes).astype(np.uint8)
    for channel in range(channels):  # faster than one transposed copy
        pixels[..., channel] = rounded[channel]
    return pixels


def random_box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], generator: np.random.Generator
) -> Box:
    """A window of a random area and aspect (width / height) at a random place, by torchvision's rule.

    Ten draws of an area (even over `scale`, shares of the image) and an aspect (even in the logarithm over `aspect`);
    the first window that fits is taken. When none does, the centre: the largest window whose aspect is in range.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_TRIES):
        area = height * width * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < aspect[0]:
        h = max(1, round(width / aspect[0]))
    elif width / height > aspect[1]:
        w = max(1, round(height * aspect[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The window of a Pillow image (mode L or RGB) at size × size px: (size, size, C) uint8.

    Bicubic, antialiased, without copying the window first: at its edges the filter reads the pixels that lie just
    outside, where an image that was cropped before would end.
    """
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(view).reshape(size, size, -1)


def mirror(pixels: np.ndarray) -> np.ndarray:
    """Left and right of (H, W, C) exchanged; a view of the same memory."""
    return pixels[:, ::-1]


def grey_plane(planes: np.ndarray) -> np.ndarray:
    """(C, H, W) → (H, W): the weighted mean of the colours."""
    if len(planes) == 1:
        return planes[0]
    return np.tensordot(np.array(GREY_WEIGHTS, dtype=np.float32), planes, axes=1)


def brightness(planes: np.ndarray, factor: float) -> np.ndarray:
    """All values times `factor`: 0 is black, 1 changes nothing."""
    planes *= np.float32(factor)
    return _clipped(planes)


def contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    """Distances from the mean grey of the whole image times `factor`: 0 is one flat grey, 1 changes nothing."""
    middle = float(grey_plane(planes).mean(dtype=np.float64))
    planes *= np.float32(factor)
    planes += np.float32((1 - factor) * middle)
    return _clipped(planes)


def saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    """Distances from each pixel's grey times `factor`: 0 is grey, 1 changes nothing."""
    if len(planes) == 1:
        return planes
    own = grey_plane(planes)
    own *= np.float32(1 - factor)
    planes *= np.float32(factor)
    planes += own
    return _clipped(planes)


def hue(planes: np.ndarray, turn: float) -> np.ndarray:
    """The hue of HSV turned by `turn` of the circle (-0.5..0.5); saturation and value stay."""
    if len(planes) == 1:
        return planes
    for start, end in _row_blocks(planes):
        _turn_hue(planes[:, start:end], turn)
    return planes


def _turn_hue(planes: np.ndarray, turn: float) -> None:
    red, green, blue = planes
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = high - low
    unit = np.float32(1) / np.maximum(chroma, np.float32(1e-6))  # grey pixels: differences are 0, any finite will do
    # Sixths of the circle from red, in the sector of the largest colour: (H, W)
    place = np.where(
        high == red, (green - blue) * unit, np.where(high == green, (blue - red) * unit + 2, (red - green) * unit + 4)
    )
    place += np.float32(6 * turn)
    place -= np.float32(6) * np.floor(place * np.float32(1 / 6))
    for plane, centre, sign in ((red, 3, 1), (green, 2, -1), (blue, 4, -1)):
        # How much of the chroma a colour has: a trapezium over the circle
        share = np.abs(place - np.float32(centre))
        share *= np.float32(sign)
        share += np.float32(-1 if sign == 1 else 2)
        np.clip(share, 0, 1, out=share)
        share *= chroma
        np.add(share, low, out=plane)


def grey(planes: np.ndarray) -> np.ndarray:
    """Every channel becomes the pixel's grey."""
    if len(planes) > 1:
        planes[:] = grey_plane(planes)
    return planes


def gaussian_blur(planes: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Convolution with a Gaussian of `sigma` px that is cut at `radius` px and sums to one; a new array.

    Borders are mirrored without repeating the outermost pixel, so `radius` is cut to the shorter side - 1.
    """
    channels, height, width = planes.shape
    radius = min(radius, height - 1, width - 1)
    if radius < 1:
        return planes
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    taps = (taps / (2 * taps.sum() - 1)).astype(np.float32)  # of distances 0..radius; both sides sum to one
    rows, columns = _mirrored(height, radius), _mirrored(width, radius)
    blurred = np.empty_like(planes)
    for channel in range(channels):
        for start, end in _row_blocks(planes):
            block = np.take(planes[channel], rows[start : end + 2 * radius], axis=0)
            block = _convolved_rows(block, taps)  # (end - start, W)
            block = np.take(block, columns, axis=1)  # (end - start, W + 2·radius)
            blurred[channel, start:end] = _convolved_rows(block.T, taps).T
    return blurred


def _convolved_rows(padded: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """(n + 2·radius, m) → (n, m): symmetric `taps` laid along the rows; equal taps share a product."""
    radius = len(taps) - 1
    end = len(padded) - radius
    total = padded[radius:end] * taps[0]
    pair = np.empty_like(total)
    for distance in range(1, radius + 1):
        np.add(padded[radius - distance : end - distance], padded[radius + distance : end + distance], out=pair)
        pair *= taps[distance]
        total += pair
    return total


def _mirrored(length: int, radius: int) -> np.ndarray:
    """Places 0..length - 1 with `radius` more on each side, mirrored at the outermost ones."""
    places = np.abs(np.arange(-radius, length + radius))
    return np.where(places < length, places, 2 * (length - 1) - places)


def _row_blocks(planes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Bounds of runs of rows so small that what is computed on the way stays in the processor's cache."""
    _, height, width = planes.shape
    rows = max(1, _BLOCK // width)
    return ((start, min(start + rows, height)) for start in range(0, height, rows))


def solarise(pixels: np.ndarray, threshold: int) -> np.ndarray:
    """uint8 values of `threshold` or more become 255 - value."""
    return np.where(pixels >= threshold, 255 - pixels, pixels)


def _clipped(planes: np.ndarray) -> np.ndarray:
    return np.clip(planes, 0, 255, out=planes)
