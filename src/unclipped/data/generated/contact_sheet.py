"""Samples side by side on one image, question and answer below each, for looking at what a source draws."""

from __future__ import annotations

from PIL import Image

from unclipped.data.generated.lettering import letter
from unclipped.data.generated.scene import INK
from unclipped.data.sample import Sample
from unclipped.data.sources import Source
from unclipped.images.decode import load_image

MARGIN, FONT_SIZE, LINE = 8, 11, 15  # px


def contact_sheet(source: Source, n: int, *, columns: int = 4, enlarge: int = 1) -> Image.Image:
    """The first `n` samples, each image enlarged by a whole factor, with "question → answer" below it."""
    samples = [source[i] for i in range(n)]
    pictures = [_picture(sample, enlarge) for sample in samples]
    texts = [_wrap(f"{sample.question} → {sample.answer}", max(p.width for p in pictures)) for sample in samples]
    width = max(picture.width for picture in pictures) + MARGIN
    height = max(p.height for p in pictures) + MARGIN + LINE * max(len(lines) for lines in texts)
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        x, y = MARGIN + (i % columns) * width, MARGIN + (i // columns) * height
        sheet.paste(picture, (x, y))
        for k, line in enumerate(lines):
            ink = letter(line, "sans", FONT_SIZE)
            top = y + picture.height + 3 + k * LINE + FONT_SIZE - ink.baseline
            for mask, dx, dy in ink.stamps:
                sheet.paste(INK, (x + dx, top + dy), mask)
    return sheet


def _picture(sample: Sample, enlarge: int) -> Image.Image:
    if not sample.images:
        return Image.new("RGB", (160, 4), (225, 225, 225))
    image = sample.images[0].source
    if not isinstance(image, Image.Image):
        image = load_image(image)
    return image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and letter(longer, "sans", FONT_SIZE).width <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
