"""A weighted mixture of sources in which draw i is a pure function of the seed and i: to resume is to go on at i."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from unclipped.core.errors import DataError, UsageError
from unclipped.data.augment import augment
from unclipped.data.config import AugmentConfig, DataConfig
from unclipped.data.order import WindowedOrder
from unclipped.data.sample import Sample, SampleGroup, TextPart
from unclipped.data.sources import Source, image_key, open_sources, runs_of

logger = logging.getLogger("unclipped.data")
T = TypeVar("T")

BAD_IN_A_ROW = 1000
_MAX_BLOCK = 1 << 20
_IMAGE_UNITS = 64


class Mixture:
    """Samples drawn from weighted sources without end.

    Each finite source is gone through in a fresh permutation per epoch, so an epoch holds every sample once; a source
    that declares `runs` is shuffled by files and in windows, so that its reads stay near each other. Weights
    are shares of draws: after any number of whole blocks the draws from a source differ from its exact share by less
    than one. With `share_image`, the unit of drawing is the group of consecutive samples about the same images.
    """

    def __init__(self, config: DataConfig, seed: int = 0, sources: Sequence[Source] | None = None) -> None:
        self.config = config
        self.seed = seed if config.seed is None else config.seed
        opened = sources if sources is not None else open_sources(config, seed=self.seed)
        if len(opened) != len(config.sources):
            raise UsageError(f"expected {len(config.sources)} sources, found {len(opened)}")
        self.units = [_units(source, config) for source in opened]
        self.skipped = 0
        weights = np.array([source.weight for source in config.sources], dtype=np.float64)
        shares = weights / weights.sum()
        # Long enough that each source stands several times in every block: no block owes draws to another.
        self._block = max(64, math.ceil(4 / shares.min()))
        if self._block > _MAX_BLOCK:
            raise UsageError(
                f"weights {weights.tolist()}: the smallest share is below {4 / _MAX_BLOCK:.0e}; raise or drop it"
            )
        self._upper = np.minimum(np.cumsum(shares), 1.0)
        self._upper[-1] = 1.0
        self._order = lru_cache(maxsize=8)(self._block_order)
        self._permutation = lru_cache(maxsize=2 * len(opened))(self._epoch_permutation)

    @property
    def length(self) -> int | None:
        """Units of all sources together (samples, or groups with `share_image`); None when one of them is endless."""
        lengths = [unit.length for unit in self.units]
        return None if any(length is None for length in lengths) else sum(length or 0 for length in lengths)

    def read(self, index: int) -> Sample | SampleGroup:
        """Draw `index`, augmented or blind as configured. Raises DataError when it is unusable, under any policy."""
        which, unit_index = self.place(index)
        item = self.units[which].get(unit_index)
        steps = self._augmentation(which)
        if steps is not None:
            item = augment(
                item, steps, np.random.default_rng([self.seed, index, 7]), blind=self.config.blind == "removed"
            )
        return item.without_images() if self.config.blind == "removed" else item

    def sample(self, index: int) -> Sample | SampleGroup:
        """Draw `index` under the policy for bad samples."""
        return self.first_good(index, lambda item: item)

    def first_good(self, index: int, make: Callable[[Sample | SampleGroup], T]) -> T:
        """`make` of draw `index`; with `on_bad_sample: skip`, a DataError is logged, counted, and the next draw tried.

        Raises DataError when draws fail and the policy is `stop`, or when too many fail one after the other.
        """
        last: DataError | None = None
        for step in range(BAD_IN_A_ROW):
            try:
                return make(self.read(index + step))
            except DataError as error:
                if self.config.on_bad_sample == "stop":
                    raise
                self.skipped += 1
                logger.warning("skipped draw %d (%d so far in this process): %s", index + step, self.skipped, error)
                last = error
        raise DataError(f"{BAD_IN_A_ROW} draws in a row cannot be used; the last: {last}")

    def place(self, index: int) -> tuple[int, int]:
        """(source, unit of it) of draw `index`."""
        if index < 0:
            raise IndexError(f"draw {index}: expected 0 or more")
        if len(self.units) == 1:
            which, position = 0, index
        else:
            block, offset = divmod(index, self._block)
            order, earlier_in_block = self._order(block)
            which = int(order[offset])
            position = int(self._drawn(block * self._block)[which] + earlier_in_block[offset])
        length = self.units[which].length
        if length is None:
            return which, position
        epoch, within = divmod(position, length)
        return which, int(self._permutation(which, epoch)[within])

    def lengths(self, index: int, image_cost: Callable[[int, int], int] | None = None) -> int:
        """Estimated tokens of draw `index`, for grouping by length: a quarter of the characters and the images' cost.

        `image_cost(height_px, width_px)` gives the tokens of an image, whose size is then read from its header; without
        it every image counts as 64.
        """
        which, unit_index = self.place(index)
        item = self.units[which].get(unit_index)
        samples = item.samples if isinstance(item, SampleGroup) else (item,)
        characters = sum(
            len(part.text)
            for sample in samples
            for turn in sample.turns
            for part in turn.parts
            if isinstance(part, TextPart)
        )
        images = () if self.config.blind == "removed" else item.images
        if image_cost is None:
            return characters // 4 + 1 + _IMAGE_UNITS * len(images)
        from unclipped.images.decode import read_header

        headers = (read_header(image.source, image.label) for image in images)
        return characters // 4 + 1 + sum(image_cost(header.height, header.width) for header in headers)

    def _augmentation(self, which: int) -> AugmentConfig | None:
        own = self.config.sources[which].augment
        return own if own is not None else self.config.augment

    def _drawn(self, count: int) -> np.ndarray:
        """Draws of each source among the first `count`: (sources,); rounded cumulative shares sum to it exactly."""
        return np.diff(np.floor(count * self._upper + 0.5), prepend=0.0).astype(np.int64)

    def _block_order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each draw in a block, and how many draws of that source come before it inside the block."""
        counts = self._drawn((block + 1) * self._block) - self._drawn(block * self._block)
        order = np.repeat(np.arange(len(counts)), counts)  # (block,)
        np.random.default_rng([self.seed, block, 1]).shuffle(order)
        earlier = np.zeros_like(order)
        for which in range(len(counts)):
            where = order == which
            earlier[where] = np.arange(where.sum())
        return order, earlier

    def _epoch_permutation(self, which: int, epoch: int) -> np.ndarray | WindowedOrder:
        runs = self.units[which].runs
        if runs is not None:
            return runs.order([self.seed, which, epoch, 2])
        length = self.units[which].length or 0
        kind = np.int32 if length < 2**31 else np.int64  # 4 bytes a sample
        return np.random.default_rng([self.seed, which, epoch, 2]).permutation(length).astype(kind)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_order", "_permutation")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=8)(self._block_order)
        self._permutation = lru_cache(maxsize=2 * len(self.units))(self._epoch_permutation)


class _Units:
    """Single samples of a source as the units that are drawn."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.length = source.length
        self.runs = runs_of(source)

    def get(self, index: int) -> Sample | SampleGroup:
        return self.source[index]


class _GroupUnits:
    """Runs of consecutive samples as units; `bounds` holds where each run starts, and the end."""

    def __init__(self, source: Source, bounds: np.ndarray) -> None:
        self.source, self.bounds = source, bounds
        self.length: int | None = len(bounds) - 1
        runs = runs_of(source)
        self.runs = None if runs is None else runs.selected(bounds[:-1])

    def get(self, index: int) -> Sample | SampleGroup:
        start, end = int(self.bounds[index]), int(self.bounds[index + 1])
        return _group(self.source, start, end)


class _EndlessGroupUnits:
    """Groups of `size` samples of an endless source that declares how many share an image."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size
        self.length: int | None = None
        self.runs = None  # without an end there is no epoch to order

    def get(self, index: int) -> Sample | SampleGroup:
        return _group(self.source, index * self.size, (index + 1) * self.size)


def _group(source: Source, start: int, end: int) -> Sample | SampleGroup:
    samples = tuple(source[index] for index in range(start, end))
    return samples[0] if len(samples) == 1 else SampleGroup(samples)


def _units(source: Source, config: DataConfig) -> _Units | _GroupUnits | _EndlessGroupUnits:
    if not config.share_image:
        return _Units(source)
    if source.length is None:
        per_image = int(getattr(source, "samples_per_image", 1))
        largest = min(per_image, config.max_group or per_image)
        size = next(size for size in range(largest, 0, -1) if per_image % size == 0)  # a divisor stays inside one image
        return _Units(source) if size == 1 else _EndlessGroupUnits(source, size)
    return _GroupUnits(source, group_bounds(source, config.max_group))


def group_bounds(source: Source, max_group: int | None = None) -> np.ndarray:
    """Starts of the runs of consecutive samples about the same images, and the end: int64 (groups + 1,).

    Text-only samples stand alone, and so do samples that cannot be read (reading them raises again when they are
    drawn). One pass over the source.
    """
    bounds = [0]
    previous: str | None = None
    for index in range(source.length or 0):
        try:
            key = image_key(source[index]) or None
        except DataError:
            key = None
        full = max_group is not None and index - bounds[-1] >= max_group
        if index and (key is None or key != previous or full):
            bounds.append(index)
        previous = key
    return np.array([*bounds, source.length or 0], dtype=np.int64)
