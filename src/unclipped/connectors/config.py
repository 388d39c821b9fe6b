"""What a connector is made of, its text form, and how many tokens it gives. No torch here: recipes read this.

Text form: steps and one projection joined by `+`, from the encoder to the language model, for example
`average(2) + mlp(2)`, `pixel_shuffle(4x1)+linear`, `resample(4x4) + standardise + linear`, `mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unclipped.core.config import FrozenConfig, Whole
from unclipped.core.errors import UsageError, nearest
from unclipped.images.config import Grid

STEP_KINDS = ("average", "pixel_shuffle", "resample")
PROJECTION_KINDS = ("linear", "mlp")
_WORDS = (*STEP_KINDS, *PROJECTION_KINDS, "standardise")
_ITEM = re.compile(r"^([a-z_]+)(?:\(\s*(\d+)(?:\s*[x,×]\s*(\d+))?\s*\))?$")

MAX_SIDE = 1024
"""Rows or columns of a block, or of a grid that is resampled to."""
MAX_LAYERS = 64
MAX_STEPS = 16
_MAX_CHARACTERS = 1000

StepSide = Annotated[Whole, Field(ge=1, le=MAX_SIDE)]


class Step(FrozenConfig):
    """One change of the grid before the projection."""

    kind: Literal["average", "pixel_shuffle", "resample"]
    """`average`: mean of each block; `pixel_shuffle`: the block's features side by side; `resample`: bilinear."""

    size: tuple[StepSide, StepSide]
    """(rows, columns): of a block for `average` and `pixel_shuffle`, of the whole new grid for `resample`."""

    def out_grid(self, grid: Grid) -> Grid:
        """Grid (frames, rows, columns) after this step. Raises UsageError when a block does not divide the grid."""
        frames, rows, columns = grid
        if self.kind == "resample":
            return frames, *self.size
        if rows % self.size[0] or columns % self.size[1]:
            raise UsageError(
                f"connector step {self}: the patch grid {rows}x{columns} is not divisible by "
                f"{self.size[0]}x{self.size[1]}; choose an image size whose grid is, or set the image rule's `merge` "
                f"to ({self.size[0]}, {self.size[1]})"
            )
        return frames, rows // self.size[0], columns // self.size[1]

    def out_width(self, width: int) -> int:
        """Features per position after this step."""
        return width * self.size[0] * self.size[1] if self.kind == "pixel_shuffle" else width

    def __str__(self) -> str:
        rows, columns = self.size
        return (
            f"{self.kind}({rows})" if rows == columns and self.kind != "resample" else f"{self.kind}({rows}x{columns})"
        )


class ConnectorConfig(FrozenConfig):
    """A connector: grid steps, then a projection to the width of the language model."""

    before: Annotated[tuple[Step, ...], Field(max_length=MAX_STEPS)] = ()
    """Steps applied to the grid of features, in order."""

    kind: Literal["linear", "mlp"] = "mlp"
    """`linear`: one layer; `mlp`: `layers` layers with exact GELU between them."""

    layers: Annotated[Whole, Field(ge=1, le=MAX_LAYERS)] = 2
    """Number of linear layers of an `mlp`."""

    standardise: bool = False
    """Subtract a mean and divide by a standard deviation per input feature, measured once before training."""

    init: Literal["default", "embedding"] = "default"
    """Start of the last layer: `default`, or `embedding`: weights N(0, embedding std / sqrt(inputs)) and the mean token
    embedding as bias, so that a first image looks like text to the language model."""

    @model_validator(mode="before")
    @classmethod
    def _linear_has_one_layer(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") == "linear":
            if data.get("layers", 1) != 1:
                raise ValueError(f"layers: a linear connector has 1, found {data['layers']}; use kind 'mlp'")
            return {**data, "layers": 1}
        return data

    def out_grid(self, grids: Iterable[Sequence[int]]) -> list[Grid]:
        """Grids (frames, rows, columns) of the tokens, one for each grid of patches. Raises UsageError (see Step)."""
        result = []
        for frames, rows, columns in grids:
            grid: Grid = (int(frames), int(rows), int(columns))
            for step in self.before:
                grid = step.out_grid(grid)
            result.append(grid)
        return result

    def num_tokens(self, grids: Iterable[Sequence[int]]) -> list[int]:
        """Tokens of each image: the one count that configuration, module and processor share."""
        return [frames * rows * columns for frames, rows, columns in self.out_grid(grids)]

    def in_features(self, vision_hidden: int) -> int:
        """Width that reaches the projection when the encoder gives `vision_hidden` features."""
        for step in self.before:
            vision_hidden = step.out_width(vision_hidden)
        return vision_hidden

    @property
    def merge(self) -> tuple[int, int]:
        """(rows, columns) that a patch grid must be divisible by for this connector to accept it."""
        rows = columns = 1
        for step in self.before:
            if step.kind == "resample":  # any grid may be resampled, and what follows no longer depends on the image
                break
            rows, columns = rows * step.size[0], columns * step.size[1]
        return rows, columns

    def __str__(self) -> str:
        parts = [str(step) for step in self.before]
        if self.standardise:
            parts.append("standardise")
        parts.append("linear" if self.kind == "linear" else f"mlp({self.layers})")
        return " + ".join(parts)


def parse_connector(
    text: str | ConnectorConfig, *, init: Literal["default", "embedding"] = "default"
) -> ConnectorConfig:
    """The configuration that `text` spells (see the head of this file); `str` of it is the text again.

    Raises UsageError naming the part that is not understood.
    """
    if isinstance(text, ConnectorConfig):
        return text
    if len(text) > _MAX_CHARACTERS:
        raise UsageError(f"connector '{text:.40}…': {len(text):,} characters; the limit is {_MAX_CHARACTERS:,}")
    steps: list[Step] = []
    standardise = False
    projection: dict[str, Any] = {}
    for part in text.split("+"):
        match = _ITEM.match(part.strip().lower())
        if match is None:
            raise UsageError(
                f"connector '{text}': cannot read '{part.strip()}'; expected for example 'pixel_shuffle(2x2) + mlp(2)'"
            )
        word, first, second = match.group(1), match.group(2), match.group(3)
        if word not in _WORDS:
            raise UsageError(f"connector '{text}': unknown part '{word}'; {nearest(word, _WORDS)}")
        if projection:
            raise UsageError(f"connector '{text}': '{word}' stands after the projection; the projection comes last")
        if word in STEP_KINDS:
            if standardise:
                raise UsageError(f"connector '{text}': '{word}' stands after 'standardise'; write it before")
            if first is None:
                raise UsageError(f"connector '{text}': '{word}' needs a size, for example '{word}(2x2)'")
            size = (int(first), int(second or first))
            if min(size) < 1:
                raise UsageError(f"connector '{text}': size of '{word}' must be at least 1, found {size[0]}x{size[1]}")
            if max(size) > MAX_SIDE:
                raise UsageError(
                    f"connector '{text}': size of '{word}' must be at most {MAX_SIDE:,}, found {size[0]}x{size[1]}"
                )
            if len(steps) == MAX_STEPS:
                raise UsageError(f"connector '{text:.40}…': more than {MAX_STEPS} steps; leave some out")
            steps.append(Step(kind=word, size=size))  # type: ignore[arg-type]
        elif word == "standardise":
            standardise = True
        elif second is not None or (word == "linear" and first is not None):
            raise UsageError(f"connector '{text}': '{part.strip()}'; expected 'linear' or 'mlp(number of layers)'")
        else:
            layers = int(first) if first else (1 if word == "linear" else 2)
            if layers < 1:
                raise UsageError(f"connector '{text}': an mlp has at least 1 layer, found {layers}")
            if layers > MAX_LAYERS:
                raise UsageError(f"connector '{text}': an mlp has at most {MAX_LAYERS} layers, found {layers}")
            projection = {"kind": word, "layers": layers}
    if not projection:
        raise UsageError(f"connector '{text}': no projection; end it with 'linear' or 'mlp'")
    return ConnectorConfig(before=tuple(steps), standardise=standardise, init=init, **projection)
