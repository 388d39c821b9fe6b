"""Open a source of samples: the protocol, the way from a configuration to a reader, parts, limits and clusters."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from unclipped.core.bounded import bounded
from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import DataConfig, PartConfig, SourceConfig
from unclipped.data.order import Runs
from unclipped.data.sample import Sample


@runtime_checkable
class Source(Protocol):
    """Random access to samples. `sample = source[i]` is a pure function of i and safe in forked workers and threads.

    `length` is the number of samples, None for an endless source. An endless source that asks several questions about
    each image may declare `samples_per_image = k`: samples k·j … k·j + k − 1 then share their image. A finite source
    that lies in long files may declare `runs` (see `unclipped.data.order.Runs`), so that it is shuffled in windows.
    """

    name: str

    @property
    def length(self) -> int | None: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_source(config: SourceConfig, *, seed: int = 0) -> Source:
    """The source that `config` describes. `seed` reaches generated sources only.

    `$NAME` in a path is the environment variable NAME. Raises DataError for missing, empty or damaged files, UsageError
    for wrong options and variables that are not set.
    """
    source = _unfiltered(config, seed)
    if config.filter is not None:
        from unclipped.data.text_rich.filtering import filtered

        source = filtered(source, config.filter)
    return source


def open_sources(config: DataConfig, *, seed: int = 0) -> list[Source]:
    """Every source of a `data` section, with the section's filter where it has none of its own; as `open_source`."""
    return [
        open_source(
            source if source.filter is not None else source.model_copy(update={"filter": config.filter}), seed=seed
        )
        for source in config.sources
    ]


def _unfiltered(config: SourceConfig, seed: int) -> Source:
    config = config.model_copy(
        update={"source": expanded(config.source), "images": config.images and expanded(config.images)}
    )
    if config.source.startswith("generated:"):
        source = _open_generated(config, seed)
    else:
        from unclipped.data.readers.opening import open_reader

        source = open_reader(config)
    if config.cluster is not None:
        source = ClusteredSource(source, config.cluster)
    if config.part is not None:
        source = part_of(source, config.part)
    if config.aspect is not None:
        source = within_aspect(source, *config.aspect)
    if config.limit is not None:
        source = LimitedSource(source, config.limit)
    if source.length == 0:
        raise DataError(f"{source.name}: no sample; the file is empty or nothing is left after part and limit")
    return source


def expanded(path: str, what: str = "source") -> str:
    """`path` with environment variables and `~` filled in. Raises UsageError, naming `what`, when one is not set."""
    filled = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\{?(\w+)", filled):
        raise UsageError(
            f"{what} {path}: the environment variable {unset.group(1)} is not set; export it or edit the path"
        )
    return filled


def _open_generated(config: SourceConfig, seed: int) -> Source:
    from unclipped.data.generated.registry import open_generated

    name = config.source.removeprefix("generated:")
    if config.format != "auto" or config.images is not None:
        raise UsageError(f"source {config.source}: a generated task takes neither format nor images; remove them")
    return open_generated(name, config.split, config.options, seed)


def runs_of(source: Source) -> Runs | None:
    """How the samples of `source` lie in files, when it says so."""
    return getattr(source, "runs", None)


def image_key(sample: Sample) -> str:
    """A key that is equal for samples about the same images: paths, or digests of bytes and pixels."""
    keys = []
    for part in sample.images:
        if isinstance(part.source, str | Path):
            keys.append(str(part.source))
        elif isinstance(part.source, bytes):
            keys.append(hashlib.blake2b(part.source, digest_size=16).hexdigest())
        else:
            digest = hashlib.blake2b(part.source.tobytes(), digest_size=16)
            keys.append(f"{part.source.mode}{part.source.size}{digest.hexdigest()}")
    return "\n".join(keys)


class ClusteredSource:
    """A source whose samples carry the cluster that a regular expression finds in their id."""

    def __init__(self, source: Source, pattern: str) -> None:
        self.source, self.name, self.pattern = source, source.name, re.compile(pattern)
        self.runs = runs_of(source)

    @property
    def length(self) -> int | None:
        return self.source.length

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        what = f"{self.name}, sample {sample.id:.80}: cluster '{self.pattern.pattern}'"
        with bounded(what, memory=None, error=UsageError):
            found = self.pattern.search(sample.id)
        if found is None or found.group(1) is None:
            raise DataError(
                f"{self.name}, sample {sample.id}: the id does not match cluster '{self.pattern.pattern}'; "
                "change the expression or remove it"
            )
        return replace(sample, cluster=found.group(1))


class SelectedSource:
    """Chosen samples of a finite source, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray, name: str | None = None) -> None:
        self.source, self.name = source, name or source.name
        self.indices = np.asarray(indices, dtype=np.int64)
        runs = runs_of(source)
        self.runs = None if runs is None else runs.selected(self.indices)

    @property
    def length(self) -> int:
        return len(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.indices):
            raise IndexError(f"{self.name}: index {index} out of {len(self.indices)}")
        return self.source[int(self.indices[index])]


class LimitedSource:
    """The first `limit` samples of a source, endless or not."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source, self.name = source, source.name
        self.length: int | None = limit if source.length is None else min(limit, source.length)
        self.samples_per_image: int = getattr(source, "samples_per_image", 1)
        runs = runs_of(source)
        self.runs = None if runs is None else runs.limited(limit)

    def __len__(self) -> int:
        return self.length or 0

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < (self.length or 0):
            raise IndexError(f"{self.name}: index {index} out of {self.length}")
        return self.source[index]


def within_aspect(source: Source, lowest: float, highest: float) -> Source:
    """The samples of a finite source whose images all have width / height from `lowest` to `highest`.

    One pass that reads image headers. Raises UsageError for an endless source or an empty range.
    """
    from unclipped.images.decode import read_header

    if source.length is None:
        raise UsageError(f"{source.name} is endless and cannot be cut by aspect; use its options")
    if lowest > highest:
        raise UsageError(f"{source.name}: aspect [{lowest}, {highest}] is empty; swap the two")
    chosen = []
    for index in range(source.length):
        headers = [read_header(part.source, part.label) for part in source[index].images]
        if all(lowest <= header.width / header.height <= highest for header in headers):
            chosen.append(index)
    return SelectedSource(source, chosen, name=f"{source.name} [aspect {lowest} to {highest}]")


def on_dev_side(key: str, part: PartConfig) -> bool:
    """Whether the hash of `key` puts it on the dev side."""
    digest = hashlib.blake2b(f"{part.seed}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < part.share * 2**64


def part_of(source: Source, part: PartConfig) -> Source:
    """One side of a finite source (one pass over its rows).

    A sample that cannot be read stays on the train side, where reading it raises again. Raises UsageError when samples
    have no cluster to cut by.
    """
    if source.length is None:
        raise UsageError(f"{source.name} is endless and cannot be cut into parts; use its splits")
    chosen = []
    for index in range(source.length):
        try:
            sample = source[index]
        except DataError:
            if part.side == "train":
                chosen.append(index)
            continue
        if part.by == "cluster":
            if sample.cluster is None:
                raise UsageError(
                    f"{source.name}, sample {sample.id}: part.by is 'cluster' but the sample has none; "
                    "set cluster to a regular expression on ids, or cut by image or sample"
                )
            key = sample.cluster
        else:
            key = image_key(sample) if part.by == "image" else sample.id
        if on_dev_side(key, part) == (part.side == "dev"):
            chosen.append(index)
    return SelectedSource(source, chosen, name=f"{source.name} [{part.side} part]")
