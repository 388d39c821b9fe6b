"""The door of images: every file, object or array becomes packed patches and grids here, under one `ImageRule`.

The definition is: decode, change by the views, resize by the rule, x/255, (x - mean)/std a channel, cut into patches.
Done in that order every pass but the first ones runs over float planes. Here the patches are cut from bytes, and both
affine steps are one: x*scale + offset. The results agree within 1e-5 (the tests hold it); the pixels of the resize are
Pillow's own, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclipped.core.errors import ImageError
from unclipped.images.config import Grid, ImageRule
from unclipped.images.decode import load_image
from unclipped.images.part import ImagePart
from unclipped.images.rules import apply_rule

PLAIN = ImageRule()
"""Limits and background where no model is asked: surveys, filters, drawings."""


@dataclass(frozen=True)
class Piece:
    """One packed grid: patches float32 (frames*rows*columns, C*ph*pw), row-major."""

    patches: Tensor
    grid: Grid
    kind: Literal["image"] = "image"
    """`image`: the whole picture."""


@dataclass(frozen=True)
class Item:
    """What one placeholder in a text refers to: packed grids in the order in which their tokens follow."""

    pieces: tuple[Piece, ...]

    @property
    def patches(self) -> Tensor:
        """Patches of all pieces, (sum_patches, C*ph*pw)."""
        return self.pieces[0].patches if len(self.pieces) == 1 else torch.cat([piece.patches for piece in self.pieces])

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grid of each piece."""
        return tuple(piece.grid for piece in self.pieces)


def prepare(part: ImagePart, rule: ImageRule, view: Callable[[Image.Image], Image.Image] | None = None) -> Item:
    """Decode, resize, normalise and cut one image.

    view: one more change of the decoded image (mode RGB), after those of `part`.
    Raises ImageError that names the image, what is wrong and what to do.
    """
    return packed(resized(part, rule, view), rule)


def decoded(part: ImagePart, rule: ImageRule = PLAIN) -> Image.Image:
    """The image upright, opaque and changed by its view, before the resize: mode L when the rule has one channel, else
    RGB. Raises ImageError."""
    image = _opened(part, rule, None)
    mode = "L" if rule.channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def resized(part: ImagePart, rule: ImageRule, view: Callable[[Image.Image], Image.Image] | None = None) -> Image.Image:
    """The image at the size of the rule, 8 bits, not normalised.

    Mode RGB, or L when it is grey or the rule has one channel; see `pixels` for exactly the rule's channels.
    """
    image = _opened(part, rule, view)
    if rule.channels == 1 and image.mode != "L":
        image = image.convert("L")
    return apply_rule(image, rule)


def pixels(part: ImagePart, rule: ImageRule) -> np.ndarray:
    """The image at the size of the rule: uint8 (H, W, C)."""
    image = resized(part, rule)
    if rule.channels == 3 and image.mode == "L":
        image = image.convert("RGB")
    return np.asarray(image).reshape(image.height, image.width, rule.channels)


def packed(image: Image.Image, rule: ImageRule) -> Item:
    """Cut and normalise an image as `resized` gives it; no size is changed here.

    A grey image (mode L) costs a third of a coloured one until the last step. Raises ImageError for a mode or a size
    that `resized` does not give.
    """
    ph, pw = rule.patch_size
    w, h = image.width // pw, image.height // ph
    if image.mode != "L" and (image.mode != "RGB" or rule.channels == 1):
        raise ImageError(f"image of mode {image.mode}: expected L, or RGB for three channels; prepare it whole")
    if image.size != (w * pw, h * ph):
        raise ImageError(f"image of {image.height}x{image.width} px: no multiple of {ph}x{pw} px; prepare it whole")
    patches = torch.from_numpy(_cut(image, h, w, ph, pw)).float()  # (h*w, bands*ph*pw)
    if image.mode == "L" and rule.channels == 3:
        patches = patches.repeat(1, 3)  # equal channels: (h*w, C*ph*pw)
    scale, offset = _affine(rule.mean, rule.std, ph * pw)  # each (1, C*ph*pw)
    return Item((Piece(torch.addcmul(offset, patches, scale, out=patches), (1, h, w)),))


def normalised(planes: Tensor, rule: ImageRule) -> Tensor:
    """Planes (…, C, H, W), uint8 or floats in 0..1, on the encoder's scale: float32, for objectives that cut crops."""
    values = planes.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # once, then in place
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (rule.mean, rule.std))
    return (values if planes.is_floating_point() else values.div_(255)).sub_(mean).div_(std)


def shown(planes: Tensor, rule: ImageRule) -> np.ndarray:
    """The inverse of `normalised`, rounded: (B, C, H, W) → (B, H, W, C) uint8."""
    values = planes.detach().float().cpu()
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (rule.mean, rule.std))
    levels = ((values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


def _opened(part: ImagePart, rule: ImageRule, view: Callable[[Image.Image], Image.Image] | None) -> Image.Image:
    """Decoded under the rule's limits and background, views applied: mode RGB, or L for a grey image without views."""
    views = [change for change in (part.view, view) if change is not None]
    image = load_image(
        part.source,
        name=part.label,
        max_pixels=rule.max_pixels,
        max_side=rule.max_side,
        background=rule.background,
        keep_grey=not views,
    )
    for change in views:
        image = change(image)
    return image


def _cut(image: Image.Image, h: int, w: int, ph: int, pw: int) -> np.ndarray:
    """Bytes of an image as patches, uint8 (h*w, bands*ph*pw), values in the order channel, row, column: one copy."""
    bands = len(image.mode)  # RGB or L
    values = np.frombuffer(image.tobytes(), np.uint8).reshape(h, ph, w, pw, bands)
    return np.array(values.transpose(0, 2, 4, 1, 3), order="C").reshape(h * w, bands * ph * pw)


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], pixels: int) -> tuple[Tensor, Tensor]:
    """Rows (1, C*pixels) of scale and offset with x*scale + offset = (x/255 - mean)/std, rounded once from float64."""
    centre, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    scale, offset = 1 / (255 * spread), -centre / spread
    return scale.float().repeat_interleave(pixels)[None], offset.float().repeat_interleave(pixels)[None]
