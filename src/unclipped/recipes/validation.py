"""From a plain dictionary to a validated configuration, with errors that name the field and the nearest valid name."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from unclipped.core.config import FrozenConfig, complaint
from unclipped.core.errors import DataError, UsageError, nearest
from unclipped.recipes.loading import apply_overrides, read_recipe

_BREAKS = "\x85\u2028\u2029\ufeff"
C = TypeVar("C", bound=FrozenConfig)

COMMANDS = {"comparison": "compare-objectives", "encoder_evaluation": "eval-encoder ENCODER --recipe"}
"""The command that runs a kind of recipe, where it is not called like it."""

_MAX_LINES = 20
"""Wrong fields that an error lists."""


def load_recipe(name: str, schema: type[C], overrides: list[str] | None = None) -> C:
    """Read, override and validate a recipe. Raises UsageError with one line for each wrong field."""
    return validate(apply_overrides(read_recipe(name), overrides or []), schema, f"recipe {name}")


def validate(recipe: dict[str, Any], schema: type[C], where: str) -> C:
    """The configuration of `schema` made from `recipe`, which errors call `where`.

    Raises UsageError that names every wrong field.
    """
    kind = recipe.get("kind")
    expected = schema.model_fields["kind"].default if "kind" in schema.model_fields else None
    if expected is not None and isinstance(kind, str) and kind != expected:
        raise UsageError(
            f"{where}: is of kind '{kind:.80}'; "
            f"run it with 'unclipped {COMMANDS.get(kind, kind)} {where.removeprefix('recipe ')}'"
        )
    try:
        return schema.model_validate(recipe)
    except ValidationError as error:
        found = error.errors(include_url=False)
        for item in found:
            cause = item.get("ctx", {}).get("error")
            if isinstance(cause, DataError):  # a file that a field names
                raise cause from None
        # A list whose entries are wrong is reported as too short as well.
        causes = [item for item in found if item["type"] != "too_short" or not _is_above_another(item, found)]
        lines = [_describe(item, schema) for item in causes[:_MAX_LINES]]
        if len(causes) > _MAX_LINES:
            lines.append(f"and {len(causes) - _MAX_LINES:,} more")
        raise UsageError(f"{where}: " + "; ".join(lines)) from None


def _is_above_another(item: Any, found: Sequence[Any]) -> bool:
    depth = len(item["loc"])
    return any(len(other["loc"]) > depth and other["loc"][:depth] == item["loc"] for other in found)


def _describe(item: Any, schema: type[BaseModel]) -> str:
    """One line for one pydantic error."""
    owner, places = _follow(schema, item["loc"][:-1])
    path = ".".join(str(part) for part in (*places, *_follow(owner, item["loc"][-1:])[1]))
    if item["type"] == "extra_forbidden":
        path = ".".join(str(part) for part in (*places, item["loc"][-1]))
        valid = owner.model_fields if owner is not None else ()
        return f"unknown field '{path}' ({nearest(str(item['loc'][-1]), valid)})"
    if item["type"] == "missing":
        return f"field '{path}' is required"
    if not path:
        return str(item["msg"]).removeprefix("Value error, ")
    message = complaint(item, schema)
    return f"field '{path}': {message[:1].lower()}{message[1:]}"


def _follow(schema: type[BaseModel] | None, location: tuple[Any, ...]) -> tuple[type[BaseModel] | None, list[Any]]:
    """The model that an error's location leads to, and the location without the labels of union members.

    The model is None where the path runs through a union that it cannot tell apart.
    """
    current, places = schema, []
    for part in location:
        if isinstance(part, int) or current is None:  # an index: the element's model was found from the annotation
            places.append(part)
        elif part in current.model_fields:
            places.append(part)
            models = models_in(current.model_fields[part].annotation)
            current = models[0] if len(models) == 1 else None
    return current, places


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The configuration models that a field's annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def to_yaml(config: FrozenConfig) -> str:
    """The configuration as YAML that gives the same configuration when read again."""
    fields = config.model_dump(mode="json")
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)
    if any(character in text for character in _BREAKS):  # written as they are, they would be read as line ends
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=False, width=110)
    return text


def is_recipe_file(name: str) -> bool:
    """Whether `name` looks like a recipe file rather than a checkpoint folder."""
    return Path(name).suffix in {".yaml", ".yml"}
