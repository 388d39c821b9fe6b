"""The base of every configuration (immutable, typed, closed to unknown keys), and the ranges that its fields share.

A number in a recipe reaches libraries that hang, crash or say nothing beyond what they are made for. So every number
has a lower and an upper bound, and every text and list a greatest length; a test walks all fields.
"""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

MAX_TEXT = 100_000
"""Characters of a text without a tighter bound of its own."""


class FrozenConfig(BaseModel):
    """Frozen pydantic model that refuses unknown fields; every recipe section derives from it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        str_max_length=MAX_TEXT,
    )


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Whole = Annotated[int, Strict()]
"""A whole number, which text, fractions and booleans are not; the field gives its range."""
Number = Annotated[float, BeforeValidator(_no_boolean)]
"""A number, which booleans are not; the field gives its range. Text such as `1e-3`, which YAML reads so, is one."""

Seed = Annotated[Whole, Field(ge=0, le=2**31 - 1)]
Count = Annotated[Whole, Field(gt=0, le=10**9)]
"""How many steps, samples or images."""
CountOrZero = Annotated[Whole, Field(ge=0, le=10**9)]
BatchSize = Annotated[Whole, Field(gt=0, le=1_000_000)]
Pixels = Annotated[Whole, Field(gt=0, le=20_000)]
"""Side of an image or a view."""
PatchSide = Annotated[Whole, Field(gt=0, le=4096)]
"""Side of a patch in pixels."""
Tokens = Annotated[Whole, Field(gt=0, le=16_777_216)]
"""Length of a sequence."""
BlockTokens = Annotated[Whole, Field(gt=0, le=1_048_576)]
"""Tokens of a block of keys or queries."""
Width = Annotated[Whole, Field(gt=0, le=65_536)]
"""Features of a layer."""
Layers = Annotated[Whole, Field(gt=0, le=1024)]
Heads = Annotated[Whole, Field(gt=0, le=1024)]
Threads = Annotated[Whole, Field(gt=0, le=4096)]
Processes = Annotated[Whole, Field(gt=0, le=1024)]
Resamples = Annotated[Whole, Field(ge=100, le=1_000_000)]
"""Resamples of a bootstrap."""
Rate = Annotated[Number, Field(gt=0, le=1e30)]
"""A learning rate, a factor on one or a temperature; within float32, where a rate that breaks training is noticed."""
LossWeight = Annotated[Number, Field(ge=0, le=1_000_000)]
Share = Annotated[Number, Field(ge=0, le=1)]
"""A share or a probability."""
OpenShare = Annotated[Number, Field(gt=0, lt=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
"""Decay of a running mean."""

PathText = Annotated[str, Field(min_length=1, max_length=4096)]
"""A path, a pattern of paths, a hub id or the name of a generated task."""
Name = Annotated[str, Field(max_length=200)]
PatternText = Annotated[str, Field(min_length=1, max_length=10_000)]
"""A pattern of attention, or the path of a pattern file."""
Options = Annotated[dict[str, Any], Field(max_length=1000)]
"""Fields that another schema or library checks."""

_MAX_SHOWN = 80


def complaint(item: Mapping[str, Any], schema: type[BaseModel]) -> str:
    """What one of pydantic's errors about `schema` says, with the value that was found and the range of the field."""
    message = str(item["msg"]).removeprefix("Value error, ")
    found = item.get("input")
    if isinstance(found, str | int | float | bool | None):
        text = repr(found)
        message += f" (found {text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + '…'})"
    expected = number_range(schema, (), tuple(item["loc"]))
    return f"{message}; expected {expected}" if expected else message


def number_range(annotation: Any, metadata: Sequence[Any], place: tuple[Any, ...] = ()) -> str | None:
    """The range of the number that `place` leads to, in words; None where there is none, or more than one."""
    ranges = set(_ranges(annotation, metadata, place))
    return ranges.pop() if len(ranges) == 1 else None


def _ranges(annotation: Any, metadata: Sequence[Any], place: tuple[Any, ...]) -> Iterator[str]:
    """The ranges of the numbers that `place`, an error's location, leads to; unions add labels to locations."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _ranges(arguments[0], (*metadata, *arguments[1:]), place)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _ranges(argument, metadata, place)
            if place:
                yield from _ranges(argument, metadata, place[1:])
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if place and place[0] in annotation.model_fields:
            field = annotation.model_fields[place[0]]
            yield from _ranges(field.annotation, field.metadata, place[1:])
    elif origin is tuple and place and isinstance(place[0], int):
        yield from _ranges(arguments[0 if arguments[-1] is Ellipsis else place[0]], (), place[1:])
    elif origin is dict and place:
        yield from _ranges(arguments[1], (), place[1:])
    elif annotation in (int, float) and not place:
        yield from _range(annotation is int, metadata)


def _range(is_whole: bool, metadata: Sequence[Any]) -> Iterator[str]:
    bounds: dict[str, Any] = {}
    for item in metadata:
        for part in getattr(item, "metadata", [item]):  # a Field inside Annotated holds its own
            for name in ("ge", "gt", "le", "lt"):
                if (value := getattr(part, name, None)) is not None:
                    bounds[name] = value
    if is_whole and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if ("ge" in bounds or "gt" in bounds) and ("le" in bounds or "lt" in bounds):
        low = f"{bounds['gt']:,} (excluded)" if "gt" in bounds else f"{bounds['ge']:,}"
        high = f"{bounds['lt']:,} (excluded)" if "lt" in bounds else f"{bounds['le']:,}"
        yield f"a {'whole ' if is_whole else ''}number from {low} to {high}"


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `change` over it: mappings merge field by field, everything else is replaced."""
    merged = copy.deepcopy(base)
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
