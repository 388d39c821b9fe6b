"""Several random views of one image: two large crops and a number of small ones, with changed colours."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from unclipped.core.errors import DataError

_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
# Probability of a blur: first global crop, second, local ones; that of solarisation on the second global crop.
_BLUR, _SOLARISE = (1.0, 0.1, 0.5), 0.2
_JITTER, _GREY, _MIRROR = 0.8, 0.2, 0.5


class MultiCrop:
    """Two global crops, then `num_local` local ones, with the changes of DINOv2's recipe except for those of hue."""

    def __init__(
        self,
        global_size: int,
        local_size: int,
        num_local: int,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
    ) -> None:
        """Sizes: sides in pixels. Scales: smallest and largest share of the image's area in a crop."""
        self.global_size, self.local_size, self.num_local = global_size, local_size, num_local
        self.global_scale, self.local_scale = global_scale, local_scale

    def __call__(self, pixels: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        """pixels (H, W, C) uint8 → 2 + num_local arrays (side, side, C) uint8. Raises DataError for a tiny image."""
        height, width, channels = pixels.shape
        if min(height, width) < 2:
            raise DataError(f"multi-crop: expected an image of at least 2×2 px, found {height}×{width}")
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        views = []
        for number in range(2 + self.num_local):
            is_global = number < 2
            scale = self.global_scale if is_global else self.local_scale
            side = self.global_size if is_global else self.local_size
            view = image.resize((side, side), Image.Resampling.BICUBIC, box=_box(width, height, scale, generator))
            view = _recoloured(view, min(number, 2), generator)
            views.append(np.asarray(view).reshape(side, side, channels))
        return views


def _box(
    width: int, height: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A window (left, top, right, bottom) of a random area and shape; the largest centred square when none fits."""
    for _ in range(_TRIES):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _recoloured(view: Image.Image, kind: int, generator: np.random.Generator) -> Image.Image:
    """Mirror, brightness, contrast, saturation, grey, blur, solarisation. kind: 0, 1 global crops, 2 local."""
    if generator.random() < _MIRROR:
        view = ImageOps.mirror(view)
    if generator.random() < _JITTER:
        for enhance, spread in (
            (ImageEnhance.Brightness, 0.4),
            (ImageEnhance.Contrast, 0.4),
            (ImageEnhance.Color, 0.2),
        ):
            view = enhance(view).enhance(generator.uniform(1 - spread, 1 + spread))
    if generator.random() < _GREY and view.mode == "RGB":
        view = view.convert("L").convert("RGB")
    if generator.random() < _BLUR[kind]:
        # Published radii are for 224 px: the same share of the side here.
        view = view.filter(ImageFilter.GaussianBlur(generator.uniform(0.1, 2.0) * view.width / 224))
    if kind == 1 and generator.random() < _SOLARISE:
        view = ImageOps.solarize(view, 128)
    return view
