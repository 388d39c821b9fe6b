"""Images and captions in tar shards of the webdataset layout: KEY.jpg (.jpeg, .png, .webp) beside KEY.txt or .caption.

`source` is a .tar file, a folder of them (those that begin with the split's name, or else all), a glob, or a pattern
such as `data-{000000..000099}.tar`. Options: `caption: FIELD` takes the caption from that field of KEY.json,
`caption: none` takes images alone; `window` is how many neighbouring samples are shuffled together in training.
"""

from __future__ import annotations

import glob
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from unclipped.core.documents import decoded, parse_json
from unclipped.core.errors import DataError, UsageError
from unclipped.data import shards
from unclipped.data.config import SourceConfig
from unclipped.data.order import Runs
from unclipped.data.sample import ImagePart, Sample, TextPart, Turn
from unclipped.data.sources import Source

WINDOW = 4096
MAX_NAMES = 1_000_000
"""Files that the braces of one pattern may name."""
_OPEN_SHARDS = 16
_INDICES_KEPT = 64
_BRACES = re.compile(r"\{([^{}]+)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SUFFIXES = (".tar", ".tar.gz", ".tgz")  # the compressed ones are told here and refused by their content


class TarSource:
    """Samples of tar shards by number, shard after shard, each in the order of its archive.

    Reading raises DataError that names shard and member: damage, a missing or empty caption, a missing image.
    """

    def __init__(self, paths: list[Path], config: SourceConfig) -> None:
        self.name = config.source
        self.paths = self.files = paths
        window, self._caption = _options(config)
        lengths = [len(shards.index_of(path)) for path in paths]
        self.runs = Runs(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), window)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._descriptors)  # unlike __del__, safe when the program ends
        self._index = lru_cache(maxsize=_INDICES_KEPT)(self._opened_index)

    def _opened_index(self, shard: int) -> np.ndarray:
        records, expected = shards.index_of(self.paths[shard]), int(np.diff(self.runs.bounds)[shard])
        if len(records) != expected:
            raise DataError(
                f"shard {self.paths[shard]}: changed while it is in use: {len(records)} samples, {expected} before; "
                "start the run again"
            )
        return records

    @property
    def length(self) -> int:
        return int(self.runs.bounds[-1])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"{self.name}: index {index} out of {self.length}")
        shard = int(np.searchsorted(self.runs.bounds, index, side="right")) - 1
        record = self._index(shard)[index - int(self.runs.bounds[shard])]
        path, key = self.paths[shard], record["key"].decode("utf-8", "replace")
        _raise_for(record, path, key)
        image = ImagePart(self._member(shard, record, "image"), _label(path, key, record, "image"))
        turns = (Turn("user", (image,)),)
        answers: tuple[str, ...] = ()
        if self._caption != "none":
            answers = (self._caption_of(shard, record, path, key),)
            turns += (Turn("assistant", (TextPart(answers[0]),)),)
        return Sample(id=f"{path.stem}/{key}", turns=turns, answers=answers)

    def _caption_of(self, shard: int, record: Any, path: Path, key: str) -> str:
        role = "text" if self._caption is None else "json"
        if record[f"{role}_bytes"] < 0:
            remedy = "a field of KEY.json is taken with options: {caption: FIELD}" if role == "text" else "add the file"
            wanted = f"{key}.txt or {key}.caption" if role == "text" else f"{key}.json"
            raise DataError(
                f"shard {path}, sample {key}: no caption: expected the member {wanted}; {remedy}, "
                "images without captions with options: {caption: none}"
            )
        label = _label(path, key, record, role)
        content = self._member(shard, record, role)
        if role == "json":
            text = _field(parse_json(content, label, remedy="the member may be damaged"), str(self._caption), label)
        else:
            text = decoded(content, label)
        if not text.strip():
            raise DataError(f"{label}: the caption is empty; add the text or take the sample out")
        return text.strip()

    def _member(self, shard: int, record: Any, role: str) -> bytes:
        start, size = int(record[f"{role}_at"]), int(record[f"{role}_bytes"])
        with self._lock:  # held while reading: another thread might close the descriptor
            read = os.pread(self._descriptor(shard), size, start)
        if len(read) != size:
            label = _label(self.paths[shard], record["key"].decode("utf-8", "replace"), record, role)
            raise DataError(
                f"{label}: the shard is cut: the member has {size} bytes, {len(read)} are there; copy the shard again"
            )
        return read

    def _descriptor(self, shard: int) -> int:
        """An open shard; the one not used for longest is closed. Positioned reads make it safe to share with forks."""
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= _OPEN_SHARDS:
            os.close(self._descriptors.popitem(last=False)[1])
        try:
            self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {self.paths[shard]}: cannot be read ({error.strerror or error})") from None
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_descriptors", "_index")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def holds_shards(config: SourceConfig) -> bool:
    """Whether a source is tar shards: by its format, its name, or because its folder holds them and no data file."""
    if config.format != "auto":
        return config.format == "tar"
    path = Path(config.source)
    if not os.path.isdir(path):
        return config.source.endswith(_SUFFIXES)
    rows = any((path / f"{config.split}{suffix}").is_file() for suffix in (".jsonl", ".json", ".parquet"))
    return not rows and next(path.glob("*.tar"), None) is not None


def open_tar(config: SourceConfig) -> Source:
    """The source in tar shards. Raises DataError for missing or unreadable shards, UsageError for wrong options."""
    if config.images is not None:
        raise UsageError(f"source {config.source}: the images of tar shards lie in the shards; remove images")
    return TarSource(shard_paths(config), config)


def shard_paths(config: SourceConfig) -> list[Path]:
    """The shards a source names, sorted within each folder or glob. Raises DataError when one is missing."""
    folder = Path(config.source)
    if os.path.isdir(folder):  # a name that is too long for the system is no folder
        paths = sorted(folder.glob("*.tar"))
        found = [path for path in paths if path.name.startswith(config.split)] or paths
    else:
        names = _expanded(config.source)
        found = []
        for name in names:
            matches = sorted(glob.glob(name)) if not os.path.exists(name) and glob.has_magic(name) else [name]
            found += [Path(match) for match in matches]
    if not found:
        raise DataError(f"source {config.source}: no .tar file there")
    missing = [path for path in found if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"source {config.source}: {len(missing)} of {len(found)} shards missing, the first {missing[0]}; "
            "correct the pattern or copy them"
        )
    if len(set(found)) != len(found):
        raise DataError(f"source {config.source}: a shard is named twice; correct the pattern")
    return found


def _expanded(pattern: str) -> list[str]:
    """`pattern` with each {first..last} or {one,other} filled in, numbers as wide as the first.

    Raises UsageError for an empty range, and above MAX_NAMES before they are made.
    """
    names, made = [pattern], 0
    while any(_BRACES.search(name) for name in names):
        filled: list[str] = []
        for name in names:
            braces = _BRACES.search(name)
            choices = _choices(braces[1], pattern) if braces else [""]
            made += len(choices)
            if made > MAX_NAMES:
                raise UsageError(f"source {pattern}: names more than {MAX_NAMES:,} files, the limit; name fewer")
            before, after = (name[: braces.start()], name[braces.end() :]) if braces else (name, "")
            filled += [f"{before}{choice}{after}" for choice in choices]
        names = filled
    return names


def _choices(inside: str, pattern: str) -> Sequence[str]:
    """The texts that one pair of braces names."""
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if first > last:
        raise UsageError(f"source {pattern}: the range {{{inside}}} is empty; swap its ends")
    if last - first >= MAX_NAMES:
        raise UsageError(
            f"source {pattern}: the range {{{inside}}} names {last - first + 1:,} files; the limit is {MAX_NAMES:,}"
        )
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]


def _options(config: SourceConfig) -> tuple[int, str | None]:
    """(window, caption) from the options of a source."""
    unknown = sorted(set(config.options) - {"caption", "window"})
    if unknown:
        raise UsageError(f"source {config.source}: unknown option {', '.join(unknown)}; expected caption or window")
    window, caption = config.options.get("window", WINDOW), config.options.get("caption")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise UsageError(f"source {config.source}: option window: expected a number of samples, found {window!r}")
    if caption is not None and (not isinstance(caption, str) or not caption):
        raise UsageError(
            f"source {config.source}: option caption: expected a field of KEY.json, or none; found {caption!r}"
        )
    return window, caption


def _label(path: Path, key: str, record: Any, role: str) -> str:
    return f"shard {path}, member {key}.{record[f'{role}_suffix'].decode('utf-8', 'replace')}"


def _raise_for(record: Any, path: Path, key: str) -> None:
    """Raise what is known to be wrong with a sample before it is read."""
    trouble = {
        shards.DAMAGED: f"byte {int(record['image_at'])}, after sample {key or '(none)'}: a damaged tar header; "
        "samples behind it may be lost: copy the shard again",
        shards.UNFINISHED: f"after sample {key}: the archive stops without its end mark, so samples may be missing; "
        "copy the shard again",
        shards.EMPTY: "no sample in it; copy the shard again or leave it out",
        shards.REPEATED: f"sample {key}: the key is in the shard twice; keep the members of a sample together and "
        "its key unique",
        shards.DOTTED: f"sample {key}: no image: by the rule of webdataset a key ends at the first dot of a file name, "
        f"so that {key}.A.jpg is the member 'A.jpg' of sample {key}; write the names without other dots",
        shards.SPARSE: f"sample {key}: a sparse member, which holds only a part of its bytes; write the shard with "
        "plain members",
        shards.TOO_MANY: f"byte {int(record['image_at'])}: more than {shards.MOST_DAMAGE} damaged headers; what "
        "follows is not read: copy the shard again",
        shards.TWICE: f"sample {key}: two members of one kind (images, captions or JSON); keep one",
    }.get(int(record["trouble"]))
    if trouble is not None:
        raise DataError(f"shard {path}, {trouble}")
    if record["image_bytes"] < 0:
        expected = ", ".join(f".{suffix}" for suffix in shards.IMAGE_SUFFIXES)
        raise DataError(f"shard {path}, sample {key}: no image: expected one member {key} with {expected}")


def _field(value: Any, field: str, label: str) -> str:
    if not isinstance(value, dict):
        raise DataError(f"{label}: expected a JSON object, found {type(value).__name__}")
    if not isinstance(value.get(field), str):
        found = ", ".join(sorted(map(str, value))) or "none"
        raise DataError(f"{label}: no text in field '{field}', the caption; found the fields {found}")
    return value[field]
