"""Masks of plain figures, smooth at the edges: drawn four times too large and averaged down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw

from unclipped.data.generated.lettering import Stamp

OVERSAMPLING = 4
FIGURES = ("circle", "square", "triangle")


def _averaged(canvas: Image.Image) -> Image.Image:
    return canvas.reduce(OVERSAMPLING)


def cropped(mask: Image.Image, x: int, y: int) -> Stamp:
    """The mask cut to its ink, with the place of the cut when the whole stood at (x, y)."""
    box = mask.getbbox()
    if box is None:
        raise ValueError("a stencil without ink")
    return mask.crop(box), x + box[0], y + box[1]


@lru_cache(maxsize=1024)
def figure(kind: str, size: int) -> Image.Image:
    """A circle, square or upright triangle that fills a box of size × size px, cut to its ink."""
    large = size * OVERSAMPLING
    canvas = Image.new("L", (large, large))
    draw = ImageDraw.Draw(canvas)
    if kind == "circle":
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
    elif kind == "square":
        draw.rectangle((0, 0, large - 1, large - 1), fill=255)
    else:
        draw.polygon(((0, large - 1), (large - 1, large - 1), ((large - 1) / 2, 0)), fill=255)
    return cropped(_averaged(canvas), 0, 0)[0]


def path(points: Sequence[tuple[float, float]], thickness: float, height: int, width: int) -> Stamp:
    """A broken line through points (x, y) px on a height × width px canvas, cut to its ink."""
    canvas = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    large = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
    ImageDraw.Draw(canvas).line(large, fill=255, width=round(thickness * OVERSAMPLING), joint="curve")
    return cropped(_averaged(canvas), 0, 0)


def slice_of(start: float, end: float, diameter: int) -> Stamp:
    """A slice of a disc from `start` to `end` (turns, clockwise from the top), relative to the disc's box."""
    large = diameter * OVERSAMPLING
    canvas = Image.new("L", (large, large))
    ImageDraw.Draw(canvas).pieslice((0, 0, large - 1, large - 1), start * 360 - 90, end * 360 - 90, fill=255)
    return cropped(_averaged(canvas), 0, 0)


def on_circle(turn: float, radius: float) -> tuple[float, float]:
    """The point at `turn` (clockwise from the top) relative to the centre, px."""
    angle = 2 * math.pi * turn
    return radius * math.sin(angle), -radius * math.cos(angle)
