"""Text as stamps: glyph masks from the fonts that ship inside matplotlib, so that all machines draw alike.

Glyphs are rasterised once and set side by side by their advance widths (no kerning): several times faster than drawing
each string, and independent of the text layout libraries that Pillow may or may not be built with.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from unclipped.core.errors import UnclippedError

FONT_FILES: dict[str, str] = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
    "mono-oblique": "DejaVuSansMono-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "serif-italic": "DejaVuSerif-Italic.ttf",
}
SMALLEST_FONT = 7  # px; below it the letters of DejaVu run into each other

# (mask, x, y) with the mask's top left corner relative to the ink box of the whole string
Stamp = tuple[Image.Image, int, int]


@dataclass(frozen=True, slots=True)
class Lettering:
    """A set string: its glyph stamps, ink size in px, and the rows from the ink's top to the baseline."""

    stamps: tuple[Stamp, ...]
    width: int
    height: int
    baseline: int


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    # find_spec locates matplotlib without the half second of importing it
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise UnclippedError("generated images need the fonts inside matplotlib: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = _font_folder() / FONT_FILES[name]
    if not path.is_file():
        raise UnclippedError(f"font file {path.name} is missing from the matplotlib installation; reinstall matplotlib")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=16384)
def _glyph(character: str, font: str, size: int) -> tuple[Image.Image | None, int, int, int]:
    """(ink mask or None for a blank, left bearing, ink top relative to the baseline, advance), px."""
    face = _font(font, size)
    left, top, right, bottom = face.getbbox(character, anchor="ls")
    advance = round(face.getlength(character))
    canvas = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=face, anchor="ls")
    ink = canvas.getbbox()
    if ink is None:
        return None, 0, 0, advance
    return canvas.crop(ink), int(left) - 2 + ink[0], int(top) - 2 + ink[1], advance


@lru_cache(maxsize=16384)
def letter(text: str, font: str, size: int) -> Lettering:
    """Set `text` on one line in a font of `size` px. The ink box starts at (0, 0)."""
    placed: list[Stamp] = []
    pen = 0
    for character in text:
        mask, left, top, advance = _glyph(character, font, size)
        if mask is not None:
            placed.append((mask, pen + left, top))
        pen += advance
    x0 = min(x for _, x, _ in placed)
    y0 = min(y for _, _, y in placed)
    x1 = max(x + mask.width for mask, x, _ in placed)
    y1 = max(y + mask.height for mask, _, y in placed)
    return Lettering(tuple((mask, x - x0, y - y0) for mask, x, y in placed), x1 - x0, y1 - y0, -y0)


def fit(text: str, font: str, size: int, width: int, height: int) -> tuple[Lettering, int] | None:
    """`text` in the largest size up to `size` px whose ink fits width × height px, and that size; None if none does."""
    for px in range(size, SMALLEST_FONT - 1, -1):
        lettering = letter(text, font, px)
        if lettering.width <= width and lettering.height <= height:
            return lettering, px
    return None
