"""Connector parts: the classes of steps, which change the feature grid, and of projections, and their registries.

A part is one class. Its fields are its options, in the text form and in saved files. It knows what it does to a grid,
to the width, and to features. Registering it in a file of this folder is all there is to do. No torch at import, since
recipes read this.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from unclipped.core.config import FrozenConfig, Whole
from unclipped.core.errors import UsageError
from unclipped.core.registry import Registry
from unclipped.images.config import Grid

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_SIDE = 1024
"""Rows or columns of a block, or of a grid that is resampled to."""
Side = Annotated[Whole, Field(ge=1, le=MAX_SIDE)]
_PAIR = re.compile(r"(\d+)\s*[x×]\s*(\d+)")


class Part(FrozenConfig):
    """One part of a connector; `str` of it is its text form."""

    kind: ClassVar[str]
    """Its name, set where it is registered."""

    @model_serializer(mode="wrap")
    def _with_kind(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": self.kind, **fields(self)}

    @classmethod
    def from_text(cls, arguments: str) -> Self:
        """The part that `name(arguments)` spells: values in the order of the fields, or `field=value`.

        Raises UsageError that names the option.
        """
        names, given = list(cls.model_fields), {}
        for number, argument in enumerate(filter(None, re.split(r"\s*,\s*", arguments.strip()))):
            name, is_named, value = argument.partition("=")
            name = name.strip() if is_named else names[number] if number < len(names) else ""
            if name not in names or name in given:
                options = ", ".join(names) or "none"
                raise UsageError(f"'{cls.kind}': cannot read '{argument}'; its options are: {options}")
            given[name] = _value(value if is_named else argument)
        missing = [name for name in names if cls.model_fields[name].is_required() and name not in given]
        if missing:
            raise UsageError(f"'{cls.kind}' needs a {missing[0]}, for example '{cls.example()}'")
        return cls.from_fields(given)

    @classmethod
    def from_fields(cls, given: dict[str, Any]) -> Self:
        """The part of these options. Raises UsageError that names the option and its range."""
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            where, limits = str(first["loc"][0]) if first["loc"] else "options", first.get("ctx", {})
            words = {"ge": "must be at least", "le": "must be at most"}
            limit = next((f"{words[name]} {limits[name]:,}" for name in words if name in limits), first["msg"])
            raise UsageError(f"{where} of '{cls.kind}' {limit}, found {_text(given.get(where))}") from None

    @classmethod
    def example(cls) -> str:
        """The text form with a value for each required option, for messages and tests."""
        values = ["2x2" if name == "size" else "2" for name, field in cls.model_fields.items() if field.is_required()]
        return f"{cls.kind}({', '.join(values)})" if values else cls.kind

    def __str__(self) -> str:
        values = [_text(value) for value in self.__dict__.values()]
        return f"{self.kind}({', '.join(values)})" if values else self.kind


class Step(Part):
    """A change of the feature grid before the projection; `size` is (rows, columns) of a block unless it says other."""

    size: tuple[Side, Side]

    @classmethod
    def from_text(cls, arguments: str) -> Self:
        """As for every part; a size may also be one number, or two with a comma where it is the only option."""
        if len(cls.model_fields) == 1:
            arguments = re.sub(r"^\s*(\d+)\s*,\s*(\d+)\s*$", r"\1x\2", arguments)
        return super().from_text(re.sub(r"^\s*(\d+)\s*(?=,|$)", r"\1x\1", arguments))

    def out_grid(self, grid: Grid) -> Grid:
        """Grid (frames, rows, columns) after this step. Raises UsageError when a block does not divide the grid."""
        frames, rows, columns = grid
        if rows % self.size[0] or columns % self.size[1]:
            raise UsageError(
                f"connector step {self}: the patch grid {rows}x{columns} is not divisible by "
                f"{self.size[0]}x{self.size[1]}; choose an image size whose grid is, or set the image rule's `merge` "
                f"to ({self.size[0]}, {self.size[1]})"
            )
        return frames, rows // self.size[0], columns // self.size[1]

    @property
    def merge(self) -> tuple[int, int] | None:
        """(rows, columns) that must divide the grid; None where every grid will do and gives the same one."""
        return self.size

    def out_width(self, width: int) -> int:
        """Features per position after this step."""
        return width

    def build(self, width: int) -> Callable[[Tensor], Tensor]:
        """What changes features of one grid, (batch, rows, columns, width) in and out; a module if it learns."""
        return self.apply

    def apply(self, features: Tensor) -> Tensor:
        """Features after this step, for a step that learns nothing."""
        raise NotImplementedError(f"step {self.kind} neither has a module nor applies itself")

    def blocks(self, features: Tensor) -> Tensor:
        """(b, r, c, w) -> (b, r/size_r, size_r, c/size_c, size_c, w)."""
        batch, rows, columns, width = features.shape
        r, c = self.size
        return features.reshape(batch, rows // r, r, columns // c, c, width)

    def __str__(self) -> str:
        rows, columns = self.size
        size = str(rows) if rows == columns and self.merge is not None else f"{rows}x{columns}"
        others = [_text(value) for name, value in self.__dict__.items() if name != "size"]
        return f"{self.kind}({', '.join([size, *others])})"


class Projection(Part):
    """The last part: from the features of a position to a token of the language model."""

    def build(self, in_features: int, out_features: int) -> nn.Module:
        """A module (…, in_features) -> (…, out_features) with fresh weights."""
        raise NotImplementedError(f"projection {self.kind} builds no module")

    def last_layer(self, module: Any) -> Any:
        """The linear layer that gives the tokens, which `connector_init: embedding` starts."""
        return module[-1]


STEPS: Registry[type[Step]] = Registry("connector step", package="unclipped.connectors.parts", attribute="kind")
PROJECTIONS: Registry[type[Projection]] = Registry("projection", package="unclipped.connectors.parts", attribute="kind")


def _value(text: str) -> Any:
    """An option as written: `2x3` a pair, else a number, else the word."""
    text = text.strip()
    if match := _PAIR.fullmatch(text):
        return int(match[1]), int(match[2])
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(value: Any) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value)
