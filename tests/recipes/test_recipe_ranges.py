"""Every field of every recipe has a range, and a value outside is one line that names field, value and range."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from unclipped.attention.pattern_file import PatternFile
from unclipped.connectors.config import ConnectorConfig
from unclipped.core.config import FrozenConfig
from unclipped.core.errors import UsageError
from unclipped.data.generated.options import OPTIONS
from unclipped.data.text import TextConfig
from unclipped.encoders.importing.config import ImportConfig
from unclipped.evaluation.scorers import SCORERS
from unclipped.evaluation.sparse.config import BenchConfig, QualityConfig, SearchConfig
from unclipped.images.config import ImageRule
from unclipped.recipes.loading import read_recipe
from unclipped.recipes.schema import SCHEMAS, ComparisonRecipe, TrainRecipe
from unclipped.recipes.validation import models_in, to_yaml, validate

ROOTS: tuple[type[FrozenConfig], ...] = (
    *SCHEMAS.values(), *OPTIONS.values(), ImportConfig, QualityConfig, SearchConfig, BenchConfig, TextConfig,
    PatternFile, ImageRule, ConnectorConfig, *(SCORERS.get(name) for name in SCORERS.names()),
)  # fmt: skip


def reachable() -> list[type[BaseModel]]:
    seen: dict[type[BaseModel], None] = {}
    waiting: list[type[BaseModel]] = [*ROOTS]
    while waiting:
        model = waiting.pop()
        if model not in seen:
            seen[model] = None
            waiting += [inner for field in model.model_fields.values() for inner in models_in(field.annotation)]
    return list(seen)


def limits(metadata: tuple[Any, ...]) -> set[str]:
    """Names of the bounds in the metadata of a field, those inside a FieldInfo among them."""
    found: set[str] = set()
    for item in metadata:
        inner = item.metadata if isinstance(item, FieldInfo) else [item]
        found |= {
            name
            for part in inner
            for name in ("ge", "gt", "le", "lt", "max_length")
            if getattr(part, name, None) is not None
        }
        found |= {"strict" for part in inner if getattr(part, "strict", None)}
        found |= {
            "not a boolean" for part in inner if getattr(getattr(part, "func", None), "__name__", "") == "_no_boolean"
        }
    return found


def unbounded(annotation: Any, known: set[str]) -> Iterator[str]:
    """What lacks a bound in an annotation; `known`: the bounds that stand around it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from unbounded(arguments[0], known | limits(arguments[1:]))
    elif origin in (typing.Union, types.UnionType):
        for part in arguments:
            yield from unbounded(part, known)
    elif annotation in (int, float):
        for pair in (("ge", "gt"), ("le", "lt")):
            if not known & set(pair):
                yield f"{annotation.__name__} without {' or '.join(pair)}"
        if annotation is int and "strict" not in known:
            yield "int that takes text and booleans (use Whole)"
        if annotation is float and "not a boolean" not in known:
            yield "float that takes booleans (use Number)"
    elif origin in (tuple, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis and "max_length" not in known:
            yield "list without max_length"
        for part in arguments:
            yield from unbounded(part, set())
    elif origin is dict:
        keys = typing.get_args(arguments[0])[0] if typing.get_origin(arguments[0]) is typing.Annotated else arguments[0]
        if typing.get_origin(keys) is not Literal and "max_length" not in known:
            yield "mapping of free keys without max_length"
        yield from unbounded(arguments[1], set())


@pytest.mark.parametrize("model", reachable(), ids=lambda model: model.__name__)
def test_every_number_text_and_list_has_bounds(model: type[BaseModel]) -> None:
    found = [
        f"{name}: {lack}"
        for name, field in model.model_fields.items()
        for lack in unbounded(field.annotation, limits(tuple(field.metadata)))
    ]
    assert found == []
    assert model.model_config.get("str_max_length"), "a bound of every text"
    assert model.model_config.get("allow_inf_nan") is False


TRAIN: dict[str, Any] = {
    "model": {"vision": "v", "text": "t"},
    "data": {"sources": [{"source": "generated:shapes"}]},
    "stages": [{"train": {"connector": 1e-3}, "steps": 1}],
}
PRETRAIN: dict[str, Any] = {"objective": "dinov2", "steps": 1, "data": {"sources": [{"source": "generated:shapes"}]}}
OUTSIDE = [
    ("train", "training.seed", 10**20, "from 0 to 2,147,483,647"),
    ("train", "training.seed", -1, "from 0 to"),
    ("train", "training.threads", 10**9, "from 1 to 4,096"),
    ("train", "training.workers", 10**5, "from 0 to 1,024"),
    ("train", "stages.0.steps", 10**30, "from 1 to 1,000,000,000"),
    ("train", "stages.0.steps", True, "found True"),
    ("train", "stages.0.steps", "10", "found '10'"),
    ("train", "stages.0.batch_size", 10**9, "from 1 to 1,000,000"),
    ("train", "stages.0.train.connector", float("nan"), "finite number (found nan)"),
    ("train", "stages.0.train.connector", float("inf"), "finite number (found inf)"),
    ("train", "stages.0.train.connector", False, "expected a number (found False)"),
    ("train", "stages.0.train.connector", "fast", "found 'fast'"),
    ("train", "stages.0.schedule", ["cosine"], "input should be"),
    ("train", "stages", [], "stages"),
    ("train", "kind", ["x"], "'kind'"),
    ("train", "kind", {"a": 1}, "'kind'"),
    ("train", "model.connector", "mlp(100000)", "at most 64, found 100000"),
    ("train", "model.connector", f"pixel_shuffle({10**9}x1)", "at most 1,024, found 1000000000x1"),
    ("train", "model.connector", "mlp + " * 10**5, "at most 1000 characters"),
    ("train", "model.connector", "average(2) + " * 50 + "mlp", "more than 16 steps"),
    ("train", "model.vision_attention", "(" * 10**6, "at most 10000 characters"),
    ("train", "model.image.size", 10**9, "from 1 to 20,000"),
    ("train", "model.vision", {"llm": "lm", "patch_size": [10**9, 1]}, "from 1 to 4,096"),
    ("train", "model.vision", {"llm": "lm", "rope_theta": 0}, "greater than 0"),
    ("train", "model.vision", {"llm": "lm", "layers": 0}, "from 1 to 1,024"),
    ("train", "model.feature_layers", [10**12], "from -1,024 to 1,024"),
    ("train", "data.sources.0.limit", 10**30, "from 1 to"),
    ("train", "data.sources.0.source", "x" * 10**5, "at most 4096 characters"),
    ("train", "description", "x" * 10**6, "at most 100000 characters"),
    ("pretrain", "image_size", 10**9, "from 1 to 20,000"),
    ("pretrain", "dinov2.prototypes", 10**12, "from 1 to 1,048,576"),
    ("pretrain", "dinov2.mask_ratio", [0.1, 7], "from 0 to 1"),
    ("pretrain", "tokenizer.vocabulary_size", 10**10, "from 1 to 1,000,000"),
    ("pretrain", "masked_autoencoder.decoder_blocks", 10**6, "from 1 to 1,024"),
]


@pytest.mark.parametrize(("kind", "path", "value", "says"), OUTSIDE, ids=lambda value: str(value)[:40])
def test_a_value_outside_is_one_line_with_field_value_and_range(kind: str, path: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(changed(TRAIN if kind == "train" else PRETRAIN, path, value), SCHEMAS[kind], "recipe r")
    line = str(caught.value)
    assert says in line
    assert f"{path}'" in line or f"{path}." in line or path.split(".")[0] in line
    assert "\n" not in line
    assert len(line) < 1000


def changed(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(recipe)
    node: Any = recipe
    *steps, last = path.split(".")
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    node[int(last) if isinstance(node, list) else last] = value
    return recipe


def test_many_wrong_fields_are_counted_and_not_all_listed() -> None:
    with pytest.raises(UsageError, match=r"and 480 more$"):
        validate(changed(TRAIN, "data.sources", [{"source": 7}] * 500), SCHEMAS["train"], "recipe r")


def paths_of(model: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield before + name
        for inner in models_in(field.annotation):
            yield from paths_of(inner, f"{before}{name}.0." if "tuple" in str(field.annotation) else f"{before}{name}.")


PATHS = {kind: sorted(set(paths_of(SCHEMAS[kind]))) for kind in ("train", "pretrain")}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**9])
    | st.floats()
    | st.text(max_size=20)
    | st.just("x" * 200_000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", PATHS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_any_field_gives_a_configuration_or_one_line(kind: str, data: st.DataObject) -> None:
    path, value = data.draw(st.sampled_from(PATHS[kind])), data.draw(VALUES)
    recipe: dict[str, Any] = TRAIN if kind == "train" else PRETRAIN
    try:
        recipe = changed(recipe, path, value)
    except (IndexError, KeyError, TypeError, AttributeError):  # the path leads through what is not there
        recipe = {**recipe, path.split(".")[0]: value}
    try:
        line = str(type(validate(recipe, SCHEMAS[kind], "recipe r")))
    except UsageError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 20_000


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "\ufeffa", "line\nend ", "é ☃"])
def test_a_recorded_recipe_is_the_recipe_whatever_its_texts_hold(text: str) -> None:
    config = validate(read_recipe("clip-free") | {"description": text}, TrainRecipe, "recipe")
    assert yaml.safe_load(to_yaml(config))["description"] == text


def test_a_teacher_under_a_field_of_another_type_is_one_line() -> None:
    recipe = read_recipe("clothing-objectives")
    name = next(iter(recipe["arms"]))
    recipe["arms"][name] = {**recipe["arms"][name], "distill": True}
    with pytest.raises(UsageError, match="distill"):
        validate(recipe, ComparisonRecipe, "recipe")
