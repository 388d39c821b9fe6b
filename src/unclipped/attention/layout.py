"""Which tokens of a row are text and which are visual, of what image, at what place: read by every pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from unclipped.core.errors import UsageError
from unclipped.images.config import Grid

Sight = Literal["causal", "images", "all"]
IntArray = np.ndarray


@dataclass(frozen=True)
class Segment:
    """Tokens [start, start + length) of one kind; a visual segment is one image with its grid (t, h, w) in tokens."""

    kind: Literal["text", "visual"]
    start: int
    length: int
    image: int = -1
    grid: Grid = (0, 0, 0)


@dataclass(frozen=True)
class Layout:
    """The segments of one row without padding, in order and without gaps. Equal layouts are equal values.

    Raises UsageError when segments leave a gap or an image's grid does not hold its tokens.
    """

    segments: tuple[Segment, ...]
    sight: Sight = "causal"
    """Which later tokens a token may see: none; those of its own image (models trained so); all (encoders)."""
    is_cut: bool = False
    """Whether the row goes on behind, so that its last image may hold fewer tokens than its grid."""
    window: int = 0
    """Sliding window of the layer: a token sees no key that lies `window` or more tokens before it; 0 is no window."""

    def __post_init__(self) -> None:
        if self.window < 0 or (self.window and self.sight == "all"):
            raise UsageError(
                f"layout: a window of {self.window} tokens does not go with sight '{self.sight}'; windows are at least "
                "1 and belong to the sights causal and images"
            )
        if self.sight not in get_args(Sight):
            raise UsageError(f"layout: sight must be one of {', '.join(get_args(Sight))}, found '{self.sight}'")
        position = 0
        for index, segment in enumerate(self.segments):
            if segment.start != position or segment.length < 1:
                raise UsageError(
                    f"layout: segment {index} has start {segment.start} and length {segment.length}; expected a start "
                    f"of {position} and at least one token"
                )
            is_open = self.is_cut and index + 1 == len(self.segments) and segment.length < math.prod(segment.grid)
            if segment.kind == "visual" and math.prod(segment.grid) != segment.length and not is_open:
                raise UsageError(
                    f"layout: image {segment.image} has {segment.length} tokens, but its grid {segment.grid} "
                    f"(t, h, w) has {math.prod(segment.grid)}; give grids in tokens, after merging"
                )
            position += segment.length
        if not self.segments:
            raise UsageError("layout: no tokens")

    @cached_property
    def length(self) -> int:
        """Tokens of the row."""
        return self.segments[-1].start + self.segments[-1].length

    @cached_property
    def image(self) -> IntArray:
        """Image of each token, int32 (N,): 0, 1, … in order; -1 for text."""
        return self._fill([segment.image for segment in self.segments])

    @cached_property
    def is_visual(self) -> np.ndarray:
        """Whether each token is visual, bool (N,)."""
        return self.image >= 0

    @cached_property
    def places(self) -> IntArray:
        """Frame, row and column of each visual token in its image, int32 (3, N); zeros for text."""
        places = np.zeros((3, self.length), dtype=np.int32)
        for segment in self.segments:
            if segment.kind == "visual":
                span = slice(segment.start, segment.start + segment.length)
                grid = np.indices(segment.grid, dtype=np.int32).reshape(3, -1)  # row-major (t, h, w)
                places[:, span] = grid[:, : segment.length]
        return places

    @cached_property
    def reach(self) -> IntArray:
        """The last token that each token may see, int64 (N,); it may see all before it."""
        position = np.arange(self.length)
        if self.sight == "causal":
            return position
        if self.sight == "all":
            return np.full(self.length, self.length - 1)
        ends = self._fill([segment.start + segment.length - 1 for segment in self.segments])
        return np.where(self.is_visual, ends, position)

    @cached_property
    def begin(self) -> IntArray:
        """The first token that each token may see, int64 (N,), never decreasing; it may see all up to its reach."""
        return window_begin(np.arange(self.length), self.window)

    def with_sight(self, sight: Sight, window: int = 0) -> Layout:
        """The same tokens with another rule for later ones and another window."""
        return replace(self, sight=sight, window=window)

    def _fill(self, values: Sequence[int]) -> IntArray:
        return np.repeat(np.asarray(values, dtype=np.int32), [segment.length for segment in self.segments])

    @classmethod
    def from_token_types(
        cls,
        types: Tensor | Sequence[int],
        grids: Sequence[Grid] | None = None,
        *,
        sight: Sight = "causal",
        is_cut: bool = False,
    ) -> Layout:
        """From one number a token, (N,): 0 text, anything else visual.

        grids: (t, h, w) in tokens of each image in order; they also part images that follow each other directly.
        Without them each unbroken run of visual tokens is one image of a single row. sight, is_cut: as of the layout;
        a cut row may leave grids over, and its last image may be unfinished.
        """
        flags = torch.as_tensor(types).cpu().numpy().astype(bool)  # (N,)
        if flags.ndim != 1 or not len(flags):
            raise UsageError(f"layout: expected token types (N,) with at least one token, found {flags.shape}")
        edges = np.flatnonzero(np.diff(flags.astype(np.int8))) + 1
        segments: list[Segment] = []
        images = iter(grids) if grids is not None else None
        count = 0
        for start, stop in zip([0, *edges], [*edges, len(flags)], strict=True):
            if not flags[start]:
                segments.append(Segment("text", int(start), int(stop - start)))
                continue
            while start < stop:
                grid = (1, 1, int(stop - start)) if images is None else next(images, None)
                if grid is None:
                    raise UsageError(
                        f"layout: {int(stop - start)} visual tokens from position {int(start)} on have no grid left; "
                        f"{count} grids were given"
                    )
                tokens = math.prod(grid)
                if is_cut and stop == len(flags) and tokens > 0:
                    tokens = min(tokens, int(stop - start))
                if tokens < 1 or start + tokens > stop:
                    raise UsageError(
                        f"layout: image {count} with grid {grid} (t, h, w) needs {tokens} tokens, but "
                        f"{int(stop - start)} visual tokens stand from position {int(start)} "
                        "on; does the grid count tokens after merging?"
                    )
                segments.append(Segment("visual", int(start), tokens, count, (grid[0], grid[1], grid[2])))
                start, count = start + tokens, count + 1
        if images is not None and not is_cut and (left := sum(1 for _ in images)):
            raise UsageError(f"layout: {left} of {count + left} grids have no visual tokens in the row")
        return cls(tuple(segments), sight, is_cut)

    @classmethod
    def from_input_ids(cls, input_ids: Tensor, image_token_id: int, grids: Sequence[Grid] | None = None) -> Layout:
        """From the ids of one row without padding, (N,), and the id of the image placeholder."""
        return cls.from_token_types((input_ids == image_token_id).to(torch.int8), grids)

    @classmethod
    def of_encoder(cls, prefix: int, grid: tuple[int, int]) -> Layout:
        """Of an encoder: `prefix` class and register tokens, as text, then rows × columns patches; all see all."""
        types = [0] * prefix + [1] * math.prod(grid)
        return cls.from_token_types(types, [(1, *grid)], sight="all")


def window_begin(positions: IntArray, window: int) -> IntArray:
    """The first position that a sliding window of `window` tokens lets each position see; 0 is no window."""
    return np.maximum(positions - window + 1, 0) if window else np.zeros_like(positions)
