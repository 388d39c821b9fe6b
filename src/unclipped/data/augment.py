"""Augmentation of training samples with Pillow and numpy; every draw comes from the generator that is passed in."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unclipped.core.documents import regular_file
from unclipped.core.errors import ImageError
from unclipped.data.config import (
    AugmentConfig,
    Geometric,
    MirrorPanels,
    PermutePanels,
    Photometric,
    RandomCrop,
)
from unclipped.data.sample import ImagePart, Sample, SampleGroup

if TYPE_CHECKING:
    from PIL import Image

    Change = Callable[[Image.Image], Image.Image]


def augment(
    item: Sample | SampleGroup, config: AugmentConfig, generator: np.random.Generator, *, blind: bool = False
) -> Sample | SampleGroup:
    """`item` with every step of `config` applied; all samples of a group get the same change, images and words alike.

    Samples without images pass unchanged. With `blind`, words change as they would beside their image but no image is
    decoded or returned: a blind run then reads the very texts of the run that it is compared with. Raises ImageError
    when an image cannot be decoded.
    """
    if not config.steps or not item.images:
        return item
    samples = item.samples if isinstance(item, SampleGroup) else (item,)
    images = [] if blind else [_decoded(part) for part in item.images]
    names = [part.label for part in item.images]
    for step in config.steps:
        change, renamed = _draw(step, samples, generator)
        images = [change(image) for image in images]
        if renamed:
            samples = tuple(sample.map_text(lambda text, table=renamed: rename(text, table)) for sample in samples)
    if blind:
        changed = tuple(sample.without_images() for sample in samples)
    else:
        parts = tuple(ImagePart(image, name) for image, name in zip(images, names, strict=True))
        changed = tuple(sample.with_images(parts) for sample in samples)
    return SampleGroup(changed) if isinstance(item, SampleGroup) else changed[0]


def rename(text: str, table: Mapping[str, str]) -> str:
    """Whole words of `text` replaced by `table`, all at once, the first letter's case kept.

    >>> rename("Is left of the right box", {"left": "right", "right": "left"})
    'Is right of the left box'
    """

    def swap(found: re.Match[str]) -> str:
        word = found.group(0)
        new = table[word.lower()]
        if word.isupper():
            return new.upper()
        return new[:1].upper() + new[1:] if word[:1].isupper() else new

    return _pattern(tuple(sorted(table, key=len, reverse=True))).sub(swap, text)


@lru_cache(maxsize=64)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, words)) + r")(?![\w-])", re.IGNORECASE)


def image_size(part: ImagePart) -> tuple[int, int]:
    """(height, width) px of an image from its header. Raises ImageError when it is no image."""
    from PIL import Image

    if not isinstance(part.source, str | Path | bytes):
        return part.source.height, part.source.width
    try:
        if not isinstance(part.source, bytes) and os.path.exists(part.source):
            regular_file(part.source, ImageError)
        source = io.BytesIO(part.source) if isinstance(part.source, bytes) else part.source
        with Image.open(source) as image:
            sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if sideways else (image.height, image.width)
    except OSError as error:
        raise ImageError(f"{part.label}: cannot be read as an image ({error})") from None


def _decoded(part: ImagePart) -> Image.Image:
    from unclipped.images.decode import load_image

    return load_image(part.source, name=part.name)


def _draw(
    step: object, samples: tuple[Sample, ...], generator: np.random.Generator
) -> tuple[Change, Mapping[str, str]]:
    """The change of images and the words that trade places with it, for one step."""
    if isinstance(step, PermutePanels):
        if generator.random() >= step.probability or _holds(samples, step.unsafe):
            return _same, {}
        order = generator.permutation(len(step.panels))  # place i shows what stood at place order[i]
        table = {step.names[old]: step.names[new] for new, old in enumerate(order)}
        return lambda image: permute_panels(image, step.panels, tuple(map(int, order))), table
    if isinstance(step, MirrorPanels):
        if generator.random() >= step.probability or _holds(samples, step.unsafe):
            return _same, {}
        return _mirror, {a: b for pair in step.swap for a, b in (pair, pair[::-1])}
    if isinstance(step, Geometric):
        vertical, horizontal = (float(1 + step.scale * generator.uniform(-1, 1)) for _ in range(2))
        down, right = (int(generator.integers(-step.shift, step.shift + 1)) for _ in range(2))
        return lambda image: scale_and_shift(image, vertical, horizontal, down, right), {}
    if isinstance(step, Photometric):
        contrast = 1 + step.contrast * generator.uniform(-1, 1)
        brightness = step.brightness * generator.uniform(-1, 1)
        noise, seed = step.noise * generator.random(), int(generator.integers(2**31))
        return lambda image: change_values(image, contrast, brightness, noise, seed), {}
    assert isinstance(step, RandomCrop)
    area, ratio = generator.uniform(step.minimum_area, 1), np.exp(np.log(step.aspect) * generator.uniform(-1, 1))
    where = generator.random(2)
    flip = step.flip and generator.random() < 0.5
    return lambda image: crop_and_flip(image, area, float(ratio), float(where[0]), float(where[1]), flip), {}


def _holds(samples: tuple[Sample, ...], words: tuple[str, ...]) -> bool:
    if not words:
        return False
    pattern = _pattern(tuple(word.lower() for word in words))
    return any(pattern.search(turn.text) for sample in samples for turn in sample.turns)


def _same(image: Image.Image) -> Image.Image:
    return image


def _mirror(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def permute_panels(image: Image.Image, panels: tuple[tuple[float, float], ...], order: tuple[int, ...]) -> Image.Image:
    """`image` with the panel at place order[i] moved to place i; what lies between the panels stays."""
    lefts = [round(left * image.width) for left, _ in panels]
    width = min(round((right - left) * image.width) for left, right in panels)
    moved = image.copy()
    for new, old in enumerate(order):
        moved.paste(image.crop((lefts[old], 0, lefts[old] + width, image.height)), (lefts[new], 0))
    return moved


def scale_and_shift(image: Image.Image, vertical: float, horizontal: float, down: int, right: int) -> Image.Image:
    """Content scaled by two factors, then shifted by pixels; the frame grows and shrinks with the width and keeps its
    height, and what it uncovers takes the median colour of the image's border."""
    from PIL import Image

    pixels = np.asarray(image.convert("RGB"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = tuple(int(value) for value in np.median(border, axis=0))
    width, height = max(1, round(image.width * horizontal)), max(1, round(image.height * vertical))
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    frame = Image.new("RGB", (width, image.height), background)
    frame.paste(scaled, (right, down + (image.height - height) // 2))
    return frame.convert(image.mode) if image.mode in ("L", "RGB") else frame


def change_values(image: Image.Image, contrast: float, brightness: float, noise: float, seed: int) -> Image.Image:
    """Contrast about the mean times `contrast`, plus `brightness` and Gaussian noise, on values in 0..1."""
    from PIL import Image

    values = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"), dtype=np.float32) / 255
    values = (values - values.mean()) * contrast + values.mean() + brightness
    if noise > 0:
        values += np.random.default_rng(seed).standard_normal(values.shape, dtype=np.float32) * noise
    return Image.fromarray((values.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def crop_and_flip(image: Image.Image, area: float, ratio: float, across: float, down: float, flip: bool) -> Image.Image:
    """A window of `area` of the image, its aspect changed by `ratio`, at the place given by two fractions."""
    width = min(image.width, max(1, round(image.width * (area * ratio) ** 0.5)))
    height = min(image.height, max(1, round(image.height * (area / ratio) ** 0.5)))
    left, top = round(across * (image.width - width)), round(down * (image.height - height))
    cropped = image.crop((left, top, left + width, top + height))
    return _mirror(cropped) if flip else cropped
