"""Images with masks: generated scenes, and folders in the usual layouts, that of ADE20k among them.

However a folder numbers its classes, a mask that is read here holds 0, 1, … for them and `VOID` for pixels that are
neither trained on nor scored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unclipped.audit.config import GENERATED_TEST, GENERATED_TRAIN, SegmentationConfig
from unclipped.core.errors import DataError, UsageError
from unclipped.data.generated.masks import class_mask
from unclipped.data.generated.registry import open_generated
from unclipped.data.generated.source import GeneratedSource
from unclipped.data.readers.folder import is_image_name, walk
from unclipped.data.sample import ImagePart
from unclipped.data.sources import expanded
from unclipped.images.decode import label_map, read_header

Mask = NDArray[np.uint8]

VOID = 255
"""Value of ignored pixels in masks that were read."""
ADE20K_CLASSES = 150
ADE20K_NAMES = "objectInfo150.txt"
ADE20K_SPLITS = {"train": "training", "test": "validation"}
MASK_FOLDERS = ("masks", "annotations")
LAYOUTS = (
    "<split>/images and <split>/masks (split_folders), images/<split> and masks/<split> or annotations/<split> "
    "(kind_folders), or images/training and annotations/training (ade20k)"
)


@dataclass(frozen=True)
class SegmentedImage:
    """An image and the way to its mask, uint8 (height, width) of class numbers and `VOID`."""

    id: str
    image: ImagePart
    mask: Callable[[], Mask]


@dataclass(frozen=True)
class SegmentedSet:
    """Images with masks: to learn from and to be measured on."""

    name: str
    classes: tuple[str, ...]
    train: tuple[SegmentedImage, ...]
    test: tuple[SegmentedImage, ...]


@dataclass(frozen=True)
class Numbering:
    """How mask files number the classes: value `first` is class 0, value `ignore` is none."""

    classes: int
    first: int
    ignore: int

    def read(self, values: Mask, name: str) -> Mask:
        """Class numbers and `VOID`. Raises DataError, naming the mask, for a value that is neither."""
        ignored = values == self.ignore
        wrong = ~ignored & ((values < self.first) | (values.astype(np.int64) >= self.first + self.classes))
        if wrong.any():
            raise DataError(
                f"mask {name}: value {values[wrong].min()} is no class ({self.first} to "
                f"{self.first + self.classes - 1}) and not ignore ({self.ignore}); add the class or correct the mask"
            )
        return np.where(ignored, VOID, values - np.uint8(self.first)).astype(np.uint8)


def load_segmented(config: SegmentationConfig) -> SegmentedSet:
    """Both splits.

    Raises DataError for a folder in no known layout, a missing split or mask, UsageError for classes that are not named
    and settings that do not fit the layout.
    """
    if config.source.startswith("generated:"):
        return _generated(config)
    folder = Path(expanded(config.source, "segmentation"))
    if not folder.is_dir():
        raise DataError(f"segmentation {folder}: no such folder; check segmentation.source")
    layout = config.layout if config.layout != "auto" else detected_layout(folder, config)
    classes, numbering = config.classes, Numbering(len(config.classes), config.first_class, config.ignore)
    if layout == "ade20k":
        classes, numbering = _ade20k_classes(folder, config), Numbering(ADE20K_CLASSES, 1, 0)
    if not 2 <= len(classes) <= VOID:
        raise UsageError(
            "segmentation.classes: name the classes of the masks in the order of their numbers, at least two and at "
            "most 255"
        )
    splits = [
        _from_folders(*_folders(folder, split, layout), numbering, limit)
        for split, limit in ((config.train_split, config.train_limit), (config.test_split, config.test_limit))
    ]
    return SegmentedSet(config.source, classes, splits[0], splits[1])


def detected_layout(folder: Path, config: SegmentationConfig) -> str:
    """The layout that a folder has. Raises DataError, saying what is expected and what is there, when it has none."""
    if not config.classes and all((folder / kind / "training").is_dir() for kind in ("images", "annotations")):
        return "ade20k"
    if (folder / config.train_split / "images").is_dir():
        return "split_folders"
    if (folder / "images" / config.train_split).is_dir():
        return "kind_folders"
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise DataError(
        f"segmentation {folder}: expected {LAYOUTS} for the split '{config.train_split}', found {found}; check source "
        "and splits"
    )


def _folders(folder: Path, split: str, layout: str) -> tuple[Path, Path]:
    """Folders of the images and of the masks of a split. Raises DataError when one is missing."""
    if layout == "split_folders":
        images, masks = folder / split / "images", folder / split / "masks"
    else:
        split = ADE20K_SPLITS.get(split, split) if layout == "ade20k" else split
        images = folder / "images" / split
        kinds = ("annotations",) if layout == "ade20k" else MASK_FOLDERS
        masks = next((folder / kind / split for kind in kinds if (folder / kind).is_dir()), folder / kinds[0] / split)
    for path in (images, masks):
        if not path.is_dir():
            raise DataError(
                f"segmentation {folder}: expected the folder {path} in layout {layout}, which is missing; check "
                "source, splits and layout"
            )
    return images, masks


def _ade20k_classes(folder: Path, config: SegmentationConfig) -> tuple[str, ...]:
    """Names of the 150 classes: those given, those of the file that comes with the data, or their numbers."""
    for name, value, fitting in (("ignore", config.ignore, (0, 255)), ("first_class", config.first_class, (0, 1))):
        if value not in fitting:
            raise UsageError(
                f"segmentation.{name}: layout ade20k fixes it (0 is ignored, classes begin at 1), found {value}; leave "
                "it out, or choose layout kind_folders"
            )
    if config.classes:
        if len(config.classes) != ADE20K_CLASSES:
            raise UsageError(
                f"segmentation.classes: layout ade20k has {ADE20K_CLASSES} classes, found {len(config.classes)} names; "
                "leave them out, or choose layout kind_folders"
            )
        return config.classes
    path = folder / ADE20K_NAMES
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, ADE20K_CLASSES + 1))
    # Columns are parted by tabs; the number stands first and the name, with its synonyms, last.
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdecimal() and len(row) > 1}
    if sorted(names) != list(range(1, ADE20K_CLASSES + 1)) or not all(names.values()):
        raise DataError(
            f"{path}: expected a number from 1 to {ADE20K_CLASSES} and a name for each class, parted by tabs, found "
            f"{len(names)} of them; repair the file or remove it (classes are then called by their number)"
        )
    return tuple(names[number] for number in range(1, ADE20K_CLASSES + 1))


def _from_folders(images: Path, masks: Path, numbering: Numbering, limit: int | None) -> tuple[SegmentedImage, ...]:
    """Images of a folder, inner ones too, and the masks of the same relative names, in the order of their paths."""
    names = [os.path.join(inner, name) for inner, files in walk(images) for name in files if is_image_name(name)]
    if not names:
        raise DataError(f"segmentation {images}: no image in it")
    items = []
    for name in sorted(names)[:limit]:
        path, mask = images / name, (masks / name).with_suffix(".png")
        if not mask.is_file():
            raise DataError(f"segmentation {path}: no mask {mask}; add it or remove the image")
        part = ImagePart(str(path))
        items.append(
            SegmentedImage(name, part, lambda mask=mask, part=part: numbering.read(read_mask(mask, part), str(mask)))
        )
    return tuple(items)


def read_mask(path: Path, image: ImagePart) -> Mask:
    """The values of a mask file of mode L or P. Raises DataError for another mode, and for a size that is not the
    image's."""
    values = label_map(path, f"mask {path}")
    height, width, _ = read_header(image.source, image.label)
    if values.shape != (height, width):
        raise DataError(
            f"mask {path}: {values.shape[0]}x{values.shape[1]} px, but its image {image.label} has {height}x{width} "
            "(height x width); save both at one size"
        )
    return values


def _generated(config: SegmentationConfig) -> SegmentedSet:
    if config.classes:
        raise UsageError(f"segmentation.classes: {config.source} brings its own; leave it out")
    if config.layout != "auto" or config.first_class:
        raise UsageError(f"segmentation: layout and first_class are of folders; {config.source} takes neither")
    splits = [
        _drawn(config, config.train_split, config.train_limit or GENERATED_TRAIN),
        _drawn(config, config.test_split, config.test_limit or GENERATED_TEST),
    ]
    kinds = _open_generated(config, config.train_split).generator.kinds
    return SegmentedSet(config.source, ("background", *kinds), splits[0], splits[1])


def _open_generated(config: SegmentationConfig, split: str) -> GeneratedSource:
    name = config.source.removeprefix("generated:")
    options = {"tasks": {"count": 1}, **config.options} if name == "shapes" else config.options
    source = open_generated(name, split, options, config.seed)
    if not source.generator.kinds or source.generator.as_text:
        raise UsageError(f"segmentation.source: {config.source} draws no image here, so it has no masks; take another")
    return source


def _drawn(config: SegmentationConfig, split: str, limit: int) -> tuple[SegmentedImage, ...]:
    """Images of a generated task, each class a kind of object; what covers half of a pixel has it."""
    source = _open_generated(config, split)
    kinds = source.generator.kinds
    numbering = Numbering(1 + len(kinds), 0, config.ignore)

    def read(index: int, name: str) -> Mask:
        return numbering.read(class_mask(source.scene(index), kinds), name)

    samples = [source[index] for index in range(limit)]
    return tuple(
        SegmentedImage(sample.id, sample.images[0], partial(read, index, sample.id))
        for index, sample in enumerate(samples)
    )


def masks_at(items: Sequence[SegmentedImage], size: tuple[int, int], workers: int = 1) -> Tensor:
    """The masks of all images brought to `size` (height, width) px by the nearest pixel: uint8 (N, H, W)."""
    with ThreadPoolExecutor(workers) as pool:
        return torch.stack(list(pool.map(lambda item: _resized(item.mask(), size), items)))


def check_masks(items: Sequence[SegmentedImage], workers: int = 1) -> None:
    """Read every mask once, so that a wrong one is told before the long work and not after it."""
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda item: item.mask() is not None, items):
            pass


def _resized(mask: Mask, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image))
