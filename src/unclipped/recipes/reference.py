"""The recipe reference: every field of the schemas as Markdown, so that the page cannot drift from the program.

`python -m unclipped.recipes.reference > docs/recipe-reference.md` writes the page; a test holds it up to date.
"""

from __future__ import annotations

import sys
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from unclipped.core.config import number_range
from unclipped.recipes.schema import ComparisonRecipe, EncoderEvaluationRecipe, PretrainRecipe, TrainRecipe
from unclipped.recipes.validation import models_in

HEAD = """# Recipe reference

Made from the schema by `python -m unclipped.recipes.reference`; edit the fields' descriptions in the code, not here.

A recipe is a YAML file. `extends: NAME` starts from another recipe (a file beside it, or a built-in name; see
`unclipped recipes`): mappings merge field by field, lists are replaced. On the command line `key.path=value` changes
one field; a list entry is reached by its index or its `name` (`stages.words.steps=200`). Unknown fields are refused.
The resolved recipe stands in the run folder as `recipe.yaml`, and running that file again reproduces the run.
"""


def reference() -> str:
    """The whole page."""
    seen: dict[str, type[BaseModel]] = {}
    pages = [HEAD]
    commands = (
        ("train", "train", TrainRecipe),
        ("pretrain", "pretrain", PretrainRecipe),
        ("compare-objectives", "comparison", ComparisonRecipe),
        ("eval-encoder", "encoder_evaluation", EncoderEvaluationRecipe),
    )
    for command, kind, schema in commands:
        pages.append(f"## `unclipped {command}` (`kind: {kind}`)\n\n{_table(schema)}")
        _collect(schema, seen)
    pages.append("## Sections\n")
    for name in sorted(seen):
        pages.append(f"### {name}\n\n{_first_paragraph(seen[name])}\n\n{_table(seen[name])}")
    return "\n".join(pages).rstrip() + "\n"


def _collect(schema: type[BaseModel], seen: dict[str, type[BaseModel]]) -> None:
    for field in schema.model_fields.values():
        for model in models_in(field.annotation):
            if model.__name__ not in seen:
                seen[model.__name__] = model
                _collect(model, seen)


def _table(schema: type[BaseModel]) -> str:
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        limits = number_range(field.annotation, field.metadata)
        kind = _type(field.annotation) + (f", {limits.partition(' from ')[2]}" if limits else "")
        rows.append(f"| `{name}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel):
        return f"see {type(value).__name__}"
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown}`".replace("|", "\\|") if shown else "empty"


def _type(annotation: Any) -> str:
    """A readable name of an annotation."""
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        if issubclass(annotation, BaseModel):
            return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
        return {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "dict": "mapping"}.get(
            annotation.__name__, annotation.__name__
        )
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        if len(inner) == 1:
            return f"list of {_type(inner[0])}"
        return f"[{', '.join(_type(argument) for argument in inner)}]"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    return "any" if annotation is Any else str(annotation)


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


if __name__ == "__main__":
    sys.stdout.write(reference())
