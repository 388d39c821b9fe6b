"""Samples side by side on one image, question and answer below each, for looking at what a source draws."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from unclipped.data.generated.lettering import letter
from unclipped.data.generated.scene import INK
from unclipped.data.sample import Sample
from unclipped.data.sources import Source
from unclipped.images.prepare import decoded

MARGIN, FONT_SIZE, LINE = 8, 11, 15  # px


def contact_sheet(source: Source, n: int, *, columns: int = 4, enlarge: int = 1) -> Image.Image:
    """The first `n` samples, each image enlarged by a whole factor, with "question → answer" below it."""
    samples = [source[i] for i in range(n)]
    pictures = [_picture(sample) for sample in samples]
    pictures = [p.resize((p.width * enlarge, p.height * enlarge), Image.Resampling.NEAREST) for p in pictures]
    return sheet_of(pictures, [f"{sample.question} → {sample.answer}" for sample in samples], columns=columns)


def sheet_of(pictures: Sequence[Image.Image], texts: Sequence[str], *, columns: int = 4) -> Image.Image:
    """Pictures in rows, each with its text below it, broken to the width of the widest."""
    lines_of = [_wrap(text, max(p.width for p in pictures)) for text in texts]
    width = max(picture.width for picture in pictures) + MARGIN
    height = max(p.height for p in pictures) + MARGIN + LINE * max(len(lines) for lines in lines_of)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for i, (picture, lines) in enumerate(zip(pictures, lines_of, strict=True)):
        x, y = MARGIN + (i % columns) * width, MARGIN + (i // columns) * height
        sheet.paste(picture, (x, y))
        for k, line in enumerate(lines):
            ink = letter(line, "sans", FONT_SIZE)
            top = y + picture.height + 3 + k * LINE + FONT_SIZE - ink.baseline
            for mask, dx, dy in ink.stamps:
                sheet.paste(INK, (x + dx, top + dy), mask)
    return sheet


def _picture(sample: Sample) -> Image.Image:
    if not sample.images:
        return Image.new("RGB", (160, 4), (225, 225, 225))
    return decoded(sample.images[0])


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and letter(longer, "sans", FONT_SIZE).width <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
