"""What a source holds, counted: images and their sizes, texts, categories, duplicates, what cannot be read, and what a
filter keeps of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from unclipped.core.errors import DataError
from unclipped.data.config import TextRichFilter
from unclipped.data.generated.contact_sheet import sheet_of
from unclipped.data.sample import ImagePart, Sample
from unclipped.data.sources import Source, image_key
from unclipped.data.text_rich.filtering import kept_of
from unclipped.images.decode import read_header
from unclipped.images.prepare import decoded

NAMED = 20
"""Unreadable samples, duplicates and categories that are listed; all are counted."""
HISTOGRAM = np.linspace(0, 1, 11)
TILE, ON_SHEET, COLUMNS = 160, 24, 6  # px of the longest side of a picture; pictures on a sheet, and in a row


@dataclass
class Survey:
    """Counts over samples, filled by `add`."""

    samples: int = 0
    without_image: int = 0
    images: int = 0
    """Images that samples name, each as often as it is named."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) px of each different image."""
    channels: Counter[str] = field(default_factory=Counter)
    questions: list[int] = field(default_factory=list)
    """Characters of each text beside an image or alone in a user turn."""
    answers: list[int] = field(default_factory=list)
    """Characters of each answer or caption."""
    documents: list[int] = field(default_factory=list)
    categories: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    """What is wrong with each sample and each different image that cannot be read."""
    duplicates: list[str] = field(default_factory=list)
    """Images whose pixels are those of an image of another name, with that name."""
    _seen: dict[str, None] = field(default_factory=dict)
    _pixels: dict[str, str] = field(default_factory=dict)

    def add(self, read: Callable[[], Sample]) -> None:
        """Count the sample that `read` gives."""
        self.samples += 1
        try:
            sample = read()
        except DataError as error:
            self.unreadable.append(str(error))
            return
        self.without_image += not sample.images
        if sample.category is not None:
            self.categories[sample.category] += 1
        for turn in sample.turns:
            if not turn.text:
                continue
            lengths = {"user": self.questions, "assistant": self.answers, "document": self.documents}.get(turn.role)
            if lengths is not None:
                lengths.append(len(turn.text))
        for part in sample.images:
            self._add_image(sample, part)

    def _add_image(self, sample: Sample, part: ImagePart) -> None:
        self.images += 1
        key = image_key(Sample.picture(sample.id, part))
        if key in self._seen:
            return
        self._seen[key] = None
        try:
            image = decoded(part)
        except DataError as error:
            self.unreadable.append(str(error))
            return
        self.sizes.append((image.height, image.width))
        self.channels[read_header(part.source, part.label).mode] += 1
        content = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
        first = self._pixels.setdefault(content, part.label)
        if first != part.label:
            self.duplicates.append(f"{part.label} = {first}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; quantities are {min, median, max}, px and characters."""
        heights, widths = [height for height, _ in self.sizes], [width for _, width in self.sizes]
        return {
            "samples": self.samples,
            "samples_without_image": self.without_image,
            "images": {
                "named": self.images,
                "different": len(self._seen),
                "height": spread(heights),
                "width": spread(widths),
                "aspect": spread([width / height for height, width in self.sizes]),
                "channels": dict(self.channels.most_common()),
                "same_pixels_under_another_name": len(self.duplicates),
                "duplicates": self.duplicates[:NAMED],
            },
            "question_characters": spread(self.questions),
            "answer_characters": spread(self.answers),
            "document_characters": spread(self.documents),
            "categories": {"different": len(self.categories), "most_common": dict(self.categories.most_common(NAMED))},
            "unreadable": {"count": len(self.unreadable), "named": self.unreadable[:NAMED]},
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Count, smallest, median and largest; None without values."""
    if not values:
        return None
    low, middle, high = (round(float(value), 3) for value in np.quantile(values, [0, 0.5, 1]))
    return {"count": len(values), "min": low, "median": middle, "max": high}


def filter_report(scores: np.ndarray, config: TextRichFilter) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """(for JSON, indices kept, indices left out), both of samples with a score, from the highest score down."""
    kept = kept_of(scores, config)
    kept = kept[scores[kept] >= 0]
    others = np.setdiff1d(np.flatnonzero(scores >= 0), kept)
    readable = len(kept) + len(others)
    counts, _ = np.histogram(scores[scores >= 0], HISTOGRAM)
    report = {
        **config.model_dump(mode="json"),
        "images_scored": readable,
        "kept": len(kept),
        "share_kept": len(kept) / max(readable, 1),
        "least_score_kept": float(scores[kept].min()) if len(kept) else None,
        "highest_score": float(scores[scores >= 0].max()) if readable else None,
        "score_histogram": {f"{low:.1f} to {low + 0.1:.1f}": int(n) for low, n in zip(HISTOGRAM, counts, strict=False)},
        "cannot_be_read": int(np.isnan(scores).sum()),
        "without_image": int((scores < 0).sum()),
    }
    kept, others = (indices[np.argsort(-scores[indices], kind="stable")] for indices in (kept, others))
    return report, kept, others


def sheet(source: Source, indices: Sequence[int], texts: Callable[[int, Sample], str]) -> Image.Image | None:
    """Pictures of up to 24 of the samples, evenly taken from `indices`, each shrunk to 160 px; None without any."""
    places = (
        np.unique(np.linspace(0, len(indices) - 1, min(ON_SHEET, len(indices))).astype(int)) if len(indices) else ()
    )
    pictures, captions = [], []
    for place in places:
        index = int(indices[place])
        try:
            sample = source[index]
            picture = decoded(sample.images[0])
        except (DataError, IndexError):
            continue  # counted and named by the survey
        picture.thumbnail((TILE, TILE))
        pictures.append(picture.convert("RGB"))
        captions.append(texts(index, sample))
    return sheet_of(pictures, captions, columns=COLUMNS) if pictures else None
