"""Connector configuration: its parts, its text form, and how many tokens it gives. No torch here: recipes read this.

Text form: steps and one projection joined by `+`, from the encoder to the language model, for example
`average(2) + mlp(2)`, `pixel_shuffle(4x1)+linear`, `resample(4x4) + standardise + linear`, `mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from unclipped.connectors.parts.base import PROJECTIONS, STEPS, Part, Projection, Step
from unclipped.connectors.parts.standard import MLP
from unclipped.core.config import FrozenConfig
from unclipped.core.errors import UsageError, nearest
from unclipped.core.registry import Registry
from unclipped.images.config import Grid

STANDARDISE = "standardise"
MAX_STEPS = 16
_MAX_CHARACTERS = 1000
_ITEM = re.compile(r"([a-z_][a-z0-9_]*)\s*(?:\(([^()]*)\))?")


def _part(registry: Registry[Any], value: Any) -> Any:
    """The part of an object `{kind: NAME, …}` of a saved file."""
    if isinstance(value, Part):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError("expected an object with the field kind")
    fields = dict(value)
    try:
        return registry.get(fields.pop("kind"))(**fields)
    except UsageError as error:
        raise ValueError(str(error)) from None


class ConnectorConfig(FrozenConfig):
    """A connector: grid steps, then a projection to the width of the language model."""

    before: Annotated[tuple[SerializeAsAny[Step], ...], Field(max_length=MAX_STEPS)] = ()
    """Steps applied to the grid of features, in order."""

    standardise: bool = False
    """Subtract a mean and divide by a standard deviation per input feature, measured once before training."""

    projection: SerializeAsAny[Projection] = MLP()
    """The last part: to the width of the language model."""

    init: Literal["default", "embedding"] = "default"
    """Start of the last layer: `default`, or `embedding`: weights N(0, embedding std / sqrt(inputs)) and the mean token
    embedding as bias, so that a first image looks like text to the language model."""

    @model_validator(mode="before")
    @classmethod
    def _saved_before_projections_had_fields(cls, data: Any) -> Any:
        """Folders were once written with `kind` and `layers` here."""
        if not isinstance(data, dict) or "kind" not in data:
            return data
        fields = dict(data)
        kind, layers = fields.pop("kind"), fields.pop("layers", None)
        return {
            "projection": {"kind": kind} | ({} if kind == "linear" or layers is None else {"layers": layers})
        } | fields

    @field_validator("before", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        return [_part(STEPS, step) for step in value] if isinstance(value, list | tuple) else value

    @field_validator("projection", mode="before")
    @classmethod
    def _projection(cls, value: Any) -> Any:
        return _part(PROJECTIONS, value)

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

    def widths(self, vision_hidden: int) -> list[int]:
        """Features per position before each step and before the projection, for `vision_hidden` of the encoder."""
        widths = [vision_hidden]
        for step in self.before:
            widths.append(step.out_width(widths[-1]))
        return widths

    @property
    def merge(self) -> tuple[int, int]:
        """(rows, columns) that a patch grid must be divisible by for this connector to accept it."""
        rows = columns = 1
        for step in self.before:
            if step.merge is None:  # any grid will do, and what follows no longer depends on the image
                break
            rows, columns = rows * step.merge[0], columns * step.merge[1]
        return rows, columns

    def __str__(self) -> str:
        return " + ".join([*map(str, self.before), *([STANDARDISE] if self.standardise else []), str(self.projection)])


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
    standardise, projection = False, None
    for item in text.split("+"):
        match = _ITEM.fullmatch(item.strip().lower())
        if match is None:
            raise UsageError(
                f"connector '{text}': cannot read '{item.strip()}'; expected for example 'pixel_shuffle(2x2) + mlp(2)'"
            )
        name, arguments = match.group(1), match.group(2)
        if projection is not None:
            raise UsageError(f"connector '{text}': '{name}' comes after the projection; the projection comes last")
        if name == STANDARDISE and arguments is None:
            standardise = True
            continue
        if name not in STEPS and name not in PROJECTIONS:
            words = (*STEPS.names(), *PROJECTIONS.names(), STANDARDISE)
            raise UsageError(f"connector '{text}': unknown part '{name}'; {nearest(name, words)}")
        if name in STEPS and standardise:
            raise UsageError(f"connector '{text}': '{name}' comes after 'standardise'; write it before")
        if name in STEPS and len(steps) == MAX_STEPS:
            raise UsageError(f"connector '{text:.40}…': more than {MAX_STEPS} steps; leave some out")
        try:
            if name in STEPS:
                steps.append(STEPS.get(name).from_text(arguments or ""))
            else:
                projection = PROJECTIONS.get(name).from_text(arguments or "")
        except UsageError as error:
            raise UsageError(f"connector '{text}': {error}") from None
    if projection is None:
        raise UsageError(f"connector '{text}': no projection; end it with {' or '.join(PROJECTIONS.names())}")
    return ConnectorConfig(before=tuple(steps), standardise=standardise, projection=projection, init=init)
