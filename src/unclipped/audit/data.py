"""Labelled images from class folders, tables, question files whose answer is the label, or generated."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclipped.audit.config import GENERATED_TEST, GENERATED_TRAIN, LabelledDataConfig
from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.generated.stencils import FIGURES
from unclipped.data.readers.folder import is_image_name, walk
from unclipped.data.sample import ImagePart, Sample
from unclipped.data.sources import expanded, open_source


@dataclass(frozen=True)
class LabelledImage:
    """One image and the number of its class."""

    id: str
    image: ImagePart
    label: int


@dataclass(frozen=True)
class LabelledSet:
    """Images to learn from and images to be measured on, with the names of the classes in order of their numbers."""

    name: str
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]


def load_labelled(config: LabelledDataConfig) -> LabelledSet:
    """Both splits.

    Raises DataError for a missing split, an image without label, fewer than two classes, a class that has fewer than
    two training images, and a class of the test split that the train split lacks.
    """
    splits = {}
    for split, limit in ((config.train_split, config.train_limit), (config.test_split, config.test_limit)):
        splits[split] = _labels_of_split(config, split, limit)
    if config.train_split == config.test_split:
        raise UsageError(f"data {config.source}: train_split and test_split are both '{config.test_split}'; name two")
    train, test = splits[config.train_split], splits[config.test_split]
    counts: dict[str, int] = {}
    for _, _, label in train:
        counts[label] = counts.get(label, 0) + 1
    classes = tuple(sorted(counts))
    if len(classes) < 2:
        raise DataError(
            f"data {config.source}: the {config.train_split} split has one class only ({train[0][2]!r}); a probe needs "
            "at least two"
        )
    single = sorted(label for label, count in counts.items() if count < 2)
    if single:
        raise DataError(
            f"data {config.source}: class {single[0]!r} has 1 image in the {config.train_split} split; expected at "
            "least 2, one to learn from and one for the development part; add images or leave the class out"
        )
    for identity, _, label in test:
        if label not in counts:
            raise DataError(
                f"data {config.source}: sample {identity} of the {config.test_split} split is of class {label!r}, "
                f"which the {config.train_split} split lacks; add images of it there or leave the sample out"
            )
    numbers = {label: number for number, label in enumerate(classes)}
    both = [tuple(LabelledImage(name, part, numbers[label]) for name, part, label in rows) for rows in (train, test)]
    return LabelledSet(config.source, classes, both[0], both[1])


OF_SHAPES = ("figure", "colour", "position")
"""Labels that generated:shapes alone has."""
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def _labels_of_split(config: LabelledDataConfig, split: str, limit: int | None) -> list[tuple[str, ImagePart, str]]:
    """(id, image, label) of a split."""
    is_generated = config.source.startswith("generated:")
    if not is_generated:
        folder = Path(expanded(config.source, "data"))
        if folder.is_dir() and _has_class_folders(folder, (config.train_split, config.test_split)):
            if config.label not in ("auto", "category"):
                raise UsageError(
                    f"data.label: {config.label} does not fit {config.source}, whose images are labelled by their "
                    "folder; leave it out"
                )
            return _class_folders(folder, split, limit)
    if config.label in OF_SHAPES and config.source != "generated:shapes":
        raise UsageError(
            f"data.label: {config.label} is known of generated:shapes only, found source {config.source}; leave it "
            "out, or choose answer or category"
        )
    if is_generated and limit is None:
        limit = GENERATED_TRAIN if split == config.train_split else GENERATED_TEST
    options = dict(config.options)
    label = config.label
    if config.source == "generated:shapes":
        label = "figure" if label == "auto" else label
        if label in OF_SHAPES:
            options.setdefault("count", [1, 3])
            options.setdefault("tasks", {"count": 1})
    source = open_source(
        SourceConfig(source=config.source, split=split, limit=limit, options=options), seed=config.seed
    )
    samples = [source[index] for index in range(source.length or 0)]
    if label == "auto":
        label = "category" if not samples[0].question and not samples[0].answer else "answer"
    if label == "answer":
        _check_one_question(samples, config.source, split)
    return [(sample.id, _only_image(sample, source.name), _label_of(sample, label, source.name)) for sample in samples]


def _has_class_folders(folder: Path, splits: Sequence[str]) -> bool:
    """Whether a folder is `<split>/<class>/…` and not one of question files or tables."""
    data_files = [f"{split}{suffix}" for split in splits for suffix in (".jsonl", ".json", ".parquet")]
    if any((folder / name).is_file() for name in (*data_files, "state.json", "dataset_dict.json")):
        return False
    if any(path.suffix in (".jsonl", ".parquet") for path in folder.iterdir()):
        return False
    return any(inner.is_dir() for path in folder.iterdir() if path.is_dir() for inner in path.iterdir())


def _class_folders(folder: Path, split: str, limit: int | None) -> list[tuple[str, ImagePart, str]]:
    root = folder / split
    if not root.is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise DataError(f"data {folder}: no folder '{split}'; found {found}; set train_split and test_split to these")
    # Text all the way: a million names as path objects would take gigabytes.
    names = [f"{inner}{os.sep}{name}" for inner, files in walk(root) if inner for name in files if is_image_name(name)]
    if not names:
        raise DataError(f"data {root}: no image in its class folders; expected {split}/<class>/<image>.png or .jpg")
    if limit is not None and limit < len(names):
        # Folders come class by class: the first ones would be of one class.
        names = sorted(names, key=digest)[:limit]
    return [(name, ImagePart(os.path.join(root, name)), name.partition(os.sep)[0]) for name in names]


def digest(text: str) -> str:
    """A fixed hash of a text, for orders and cuts that do not depend on the machine."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _check_one_question(samples: Sequence[Sample], source: str, split: str) -> None:
    questions = list(dict.fromkeys(sample.question for sample in samples))
    if len(questions) > 1:
        raise DataError(
            f"data {source}, {split} split: the answer is no label of the image, as there are several questions "
            f"({questions[0]!r}, {questions[1]!r}, …); keep one question, or set label: category"
        )


def _only_image(sample: Sample, source: str) -> ImagePart:
    if len(sample.images) != 1:
        raise DataError(
            f"{source}, sample {sample.id}: expected exactly one image, found {len(sample.images)}; "
            "a probe labels single images"
        )
    return sample.images[0]


def _label_of(sample: Sample, label: str, source: str) -> str:
    if label in OF_SHAPES:
        shape = largest_shape(sample)
        if shape is None:
            raise DataError(f"{source}, sample {sample.id}: no shape to take the {label} of; raise options.count")
        if label == "position":
            return position(shape["box"], sample.metadata["scene"])
        return str(shape["kind" if label == "figure" else "colour"])
    value = sample.answer if label == "answer" else sample.category
    if not value:
        raise DataError(f"{source}, sample {sample.id}: field '{label}': missing; every image needs a label")
    return value


def shapes_of(sample: Sample) -> list[dict[str, Any]]:
    """The circles, squares and triangles of a generated scene, in painting order."""
    objects = sample.metadata.get("scene", {}).get("objects", [])
    return [item for item in objects if item["kind"] in FIGURES]


def largest_shape(sample: Sample) -> dict[str, Any] | None:
    """The shape of the largest size; among equals the first painted. None without shapes."""
    return max(shapes_of(sample), key=lambda item: item["size"], default=None)


def position(box: Sequence[int], scene: Mapping[str, Any]) -> str:
    """The ninth of a scene, 3 x 3, that the middle of a box (x0, y0, x1, y1) in px lies in.

    >>> position((60, 0, 64, 10), {"height": 64, "width": 64})
    'top right'
    """
    x0, y0, x1, y1 = box
    row, column = 3 * (y0 + y1) // (2 * scene["height"]), 3 * (x0 + x1) // (2 * scene["width"])
    return f"{ROWS[row]} {COLUMNS[column]}"


def cut_development(items: Sequence[LabelledImage], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, development) positions: of every class about `share` goes to development, at least one stays each side.

    Which ones depends on ids and seed only, not on the order.
    """
    by_class: dict[int, list[int]] = {}
    for position, item in enumerate(items):
        by_class.setdefault(item.label, []).append(position)
    development = []
    for members in by_class.values():
        ordered = sorted(members, key=lambda position: (digest(f"{seed}\n{items[position].id}"), position))
        count = min(len(members) - 1, max(1, math.floor(share * len(members) + 0.5)))
        development += ordered[:count]
    chosen = set(development)
    return [position for position in range(len(items)) if position not in chosen], sorted(chosen)
