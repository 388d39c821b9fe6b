"""A folder of images, read as it lies: every image file below it is a sample of one image and nothing else.

`<folder>/<split>/` is taken when it exists. The first folder below is the class of its images and becomes their
`category`, as in `<split>/<class>/<image>.jpg`. Links are followed, names that begin with a dot are passed over.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.readers import qa
from unclipped.data.sample import ImagePart, Sample

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


def walk(folder: Path | str) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to the first, names of its files sorted), the folder itself first ("" for it), then each inner
    one with all that is below it, by name.

    Raises DataError for a folder that cannot be listed and for a link that leads back to a folder it lies in.
    """
    root = os.fspath(folder)
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        inner, above = pending.pop()
        place = os.path.join(root, inner) if inner else root
        files, folders = [], []
        try:
            status = os.stat(place)
            with os.scandir(place) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            raise DataError(f"source {root}: folder {place} cannot be read ({error.strerror})") from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise DataError(f"source {root}: {place} is a link to a folder that it lies in; remove the link")
        yield inner, sorted(files)
        pending += [(os.path.join(inner, name), (*above, identity)) for name in sorted(folders, reverse=True)]


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file with one of the suffixes (lower case) lies anywhere in the folder."""
    return any(name.lower().endswith(suffixes) for _, names in walk(folder) for name in names)


class FolderSource:
    """The images of a folder in the order of their paths, folder by folder.

    The list is read once, when the source is opened, and held as bytes: names one after the other and a number of the
    folder for each, some tens of bytes an image.
    """

    def __init__(self, config: SourceConfig) -> None:
        """Raises DataError when there is no image or not this split, UsageError for settings without a meaning here."""
        qa.check_options(config, ())
        if config.images is not None:
            raise UsageError(f"source {config.source}: images: a folder of images takes none; name the folder itself")
        self.name = config.source
        self.root = _root_of_split(Path(config.source), config.split)
        self._folders: list[str] = []
        names, ends, folders = bytearray(), array("q", [0]), array("i")
        others: Counter[str] = Counter()
        for folder, files in walk(self.root):
            images = [name for name in files if is_image_name(name)]
            others.update(os.path.splitext(name)[1] or name for name in files if not is_image_name(name))
            for name in images:
                names += os.fsencode(name)
                ends.append(len(names))
            folders.extend([len(self._folders)] * len(images))
            self._folders.append(folder)
        if not folders:
            raise DataError(
                f"source {self.root}: no image ({', '.join(IMAGE_SUFFIXES)}) in this folder; {_found(others)}"
            )
        self._names = bytes(names)
        self._ends = np.array(ends, dtype=np.int64)  # (images + 1,)
        self._folder = np.array(folders, dtype=np.int32)  # (images,)

    @property
    def length(self) -> int:
        return len(self._folder)

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> Sample:
        """Image number `index`; its id is its path below the split's folder."""
        if not 0 <= index < len(self._folder):
            raise IndexError(f"{self.name}: index {index} out of {len(self._folder)}")
        folder = self._folders[self._folder[index]]
        path = os.path.join(folder, os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]]))
        # A name that is no UTF-8 still opens its file, but could not be written into a report.
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        category = shown.split(os.sep)[0] if folder else None
        return Sample.picture(shown, ImagePart(os.path.join(self.root, path)), category=category)


def _root_of_split(folder: Path, split: str) -> Path:
    """`<folder>/<split>`; the folder itself for the split `train` of a folder that is not divided into splits."""
    if not folder.is_dir():
        raise DataError(f"source {folder}: format images reads a folder, and this is none; name the folder")
    if (folder / split).is_dir():
        return folder / split
    splits = sorted(path.name for path in folder.iterdir() if path.name in SPLIT_NAMES and path.is_dir())
    if split == "train" and not splits:
        return folder
    found = f"found {', '.join(splits)}; set split to one of these" if splits else "cut one off with part"
    raise DataError(f"source {folder}: no folder '{split}' of images in it; {found}")


def _found(others: Counter[str]) -> str:
    if not others:
        return "it is empty"
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
    return f"found {kinds}"
