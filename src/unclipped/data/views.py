"""Random views of an image for pretraining an encoder: one, or two global and several local ones.

Views are arrays of uint8, not normalised. Every draw comes from the generator that is passed in, so equal generators
give equal views. Rules and defaults: reference of DINOv2's recipe (arXiv 2304.07193).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from unclipped.core.errors import DataError
from unclipped.data import image_ops
from unclipped.data.views_config import ColourConfig, ViewConfig, dinov2_colours


class SingleView:
    """One random window of an image at a fixed size, half of them mirrored, and colours where they are configured."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    def __call__(self, pixels: np.ndarray | Image.Image, generator: np.random.Generator) -> np.ndarray:
        """pixels (H, W, C) uint8, or a Pillow image in mode L or RGB → (size, size, C) uint8. Raises DataError."""
        return view(_opened(pixels), self.config, generator)


class MultiCrop:
    """Two global views of an image, then `num_local` local ones."""

    def __init__(
        self,
        global_size: int,
        local_size: int,
        num_local: int,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        *,
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        mirror: float = 0.5,
        colours: tuple[ColourConfig | None, ColourConfig | None, ColourConfig | None] | None = None,
        strict: bool = False,
    ) -> None:
        """Sizes: sides in pixels. Scales: smallest and largest share of the image's area in a window.

        colours: of the first global view, the second, and the local ones; None: those of DINOv2.
        strict: refuse an image with a side shorter than the view instead of enlarging it.
        """
        kinds = dinov2_colours(global_size) if colours is None else colours
        sizes, scales = (global_size, global_size, local_size), (global_scale, global_scale, local_scale)
        first, second, local = (
            ViewConfig(size=size, scale=scale, aspect=aspect, mirror=mirror, colours=kind, strict=strict)
            for size, scale, kind in zip(sizes, scales, kinds, strict=True)
        )
        self.views = (first, second, *(local,) * num_local)

    def __call__(self, pixels: np.ndarray | Image.Image, generator: np.random.Generator) -> list[np.ndarray]:
        """pixels (H, W, C) uint8, or a Pillow image in mode L or RGB → arrays (size, size, C) uint8.

        Raises DataError for other pixels, an image of a single row or column, and, when strict, a small image.
        """
        image = _opened(pixels)
        return [view(image, config, generator) for config in self.views]


def view(image: Image.Image, config: ViewConfig, generator: np.random.Generator) -> np.ndarray:
    """One random view of a Pillow image in mode L or RGB: (size, size, C) uint8. Raises DataError when strict."""
    width, height = image.size
    if config.strict and min(height, width) < config.size:
        raise DataError(
            f"views: expected an image of at least {config.size}×{config.size} px, found {height}×{width}; "
            "use larger images or smaller views, or enlarge such images with strict: false"
        )
    box = image_ops.random_box(height, width, config.scale, config.aspect, generator)
    pixels = image_ops.resized_crop(image, box, config.size)
    if generator.random() < config.mirror:
        pixels = image_ops.mirror(pixels)
    if config.colours is not None:
        pixels = recoloured(pixels, config.colours, generator)
    return np.ascontiguousarray(pixels)


def recoloured(pixels: np.ndarray, config: ColourConfig, generator: np.random.Generator) -> np.ndarray:
    """(H, W, C) uint8 with jitter, grey, blur and solarisation as they are drawn; values are rounded once."""
    has_jitter, has_grey, has_blur, has_solarise = (
        generator.random(4) < (config.jitter, config.grey, config.blur, config.solarise)
    ).tolist()
    if has_jitter or has_grey or has_blur:
        planes = image_ops.to_planes(pixels)
        if has_jitter:
            planes = _jittered(planes, config, generator)
        if has_grey:
            planes = image_ops.grey(planes)
        if has_blur:
            low, high = config.blur_sigma
            planes = image_ops.gaussian_blur(planes, generator.uniform(low, high), math.ceil(2 * high))
        pixels = image_ops.to_pixels(planes)
    return image_ops.solarise(pixels, config.solarise_from) if has_solarise else pixels


def _jittered(planes: np.ndarray, config: ColourConfig, generator: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue in a random order, each by its own draw."""
    changes = (
        (image_ops.brightness, 1.0, config.brightness),
        (image_ops.contrast, 1.0, config.contrast),
        (image_ops.saturation, 1.0, config.saturation),
        (image_ops.hue, 0.0, config.hue),
    )
    draws = generator.uniform(-1, 1, size=4)
    for which in generator.permutation(4):
        change, neutral, spread = changes[which]
        if spread:
            planes = change(planes, neutral + spread * float(draws[which]))
    return planes


def _opened(pixels: np.ndarray | Image.Image) -> Image.Image:
    """The pixels as a Pillow image. Raises DataError for what is no image of at least 2×2 px in grey or RGB."""
    if isinstance(pixels, np.ndarray):
        image = image_ops.to_image(pixels)
    elif pixels.mode in ("L", "RGB"):
        image = pixels
    else:
        raise DataError(f"views: expected an image in mode L or RGB, found {pixels.mode}; convert it first")
    if min(image.size) < 2:
        raise DataError(f"views: expected an image of at least 2×2 px, found {image.height}×{image.width}")
    return image
