"""Recipes: inheritance, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.core.config import FrozenConfig
from unclipped.core.errors import UsageError
from unclipped.recipes.loading import apply_overrides, builtin_names, merge, read_recipe
from unclipped.recipes.schema import SCHEMAS, PretrainRecipe
from unclipped.recipes.validation import load_recipe, to_yaml, validate


class Inner(FrozenConfig):
    rate: float = 0.1
    name: str = "inner"


class Outer(FrozenConfig):
    kind: Literal["toy"] = "toy"
    steps: int
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_extends_merges_fields_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "steps: 1\ninner: {rate: 0.5, name: base}\nitems: [{rate: 1}, {rate: 2}]\n")
    child = write(tmp_path, "child.yaml", "extends: base.yaml\ninner: {rate: 0.25}\nitems: [{rate: 3}]\n")
    config = load_recipe(child, Outer)
    assert config == Outer(steps=1, inner=Inner(rate=0.25, name="base"), items=(Inner(rate=3),))


def test_overrides_reach_fields_list_entries_and_names(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "steps: 1\nitems: [{name: a}, {name: b}]\n")
    config = load_recipe(path, Outer, ["steps=7", "items.b.rate=2.5", "items.0.rate=3", "inner={name: x}"])
    assert config.steps == 7
    assert [item.rate for item in config.items] == [3, 2.5]
    assert config.inner.name == "x"


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    config = Outer(steps=3, items=(Inner(rate=1e-9, name="ünï"),))
    assert load_recipe(write(tmp_path, "again.yaml", to_yaml(config)), Outer) == config


leaves = st.recursive(
    st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
mappings = st.dictionaries(st.sampled_from("abc"), leaves, max_size=3)


@settings(max_examples=100, deadline=None)
@given(base=mappings, change=mappings)
def test_merge_keeps_the_change_and_what_it_does_not_touch(base: dict, change: dict) -> None:
    merged = merge(base, change)
    assert merge(merged, change) == merged
    assert merge(base, {}) == base
    assert merge({}, change) == change
    for key in base.keys() - change.keys():
        assert merged[key] == base[key]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps: 1\nstps: 2\n", [], r"unknown field 'stps' \(did you mean 'steps'"),
        ("steps: 1\ninner: {raet: 2}\n", [], r"unknown field 'inner.raet' \(did you mean 'rate'"),
        ("steps: 1\nitems: [{nme: a}]\n", [], r"unknown field 'items.0.nme' \(did you mean 'name'"),
        ("steps: many\n", [], r"field 'steps': input should be a valid integer.*found 'many'"),
        ("inner: {rate: 1}\n", [], r"field 'steps' is required"),
        ("- 1\n- 2\n", [], r"expected a mapping of fields, found list"),
        ("steps: [1\n", [], r"line 2: not valid YAML"),
        ("extends: nowhere\nsteps: 1\n", [], r"unknown recipe 'nowhere'"),
        ("extends: 7\nsteps: 1\n", [], r"'extends' takes one recipe name, found 7"),
        ("extends: r.yaml\n", [], r"'extends' runs in a circle"),
        ("kind: pretrain\nsteps: 1\n", [], r"is of kind 'pretrain'; run it with 'unclipped pretrain"),
        ("steps: 1\n", ["steps"], r"expected key.path=value"),
        ("steps: 1\n", ["steps.deep=1"], r"'deep' lies inside a plain value"),
        ("steps: 1\nitems: [{name: a}]\n", ["items.c.rate=1"], r"no list entry 'c'; valid: a"),
        ("steps: 1\n", ["inner.rate=[1"], r"override 'inner.rate=\[1', line 1: not valid YAML"),
    ],
)
def test_each_mistake_is_one_clear_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = write(tmp_path, "r.yaml", text)
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(path, Outer, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_and_an_unknown_name_differ() -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_recipe("nowhere/recipe.yaml")
    with pytest.raises(UsageError, match="unknown recipe 'quikstart'; did you mean 'quickstart"):
        read_recipe("quikstart")


def test_overrides_leave_the_given_recipe_alone() -> None:
    recipe = {"inner": {"rate": 1}}
    apply_overrides(recipe, ["inner.rate=2"])
    assert recipe == {"inner": {"rate": 1}}


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_recipe_is_valid_and_described(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.get("kind") in SCHEMAS
    assert recipe.get("description")
    schema = SCHEMAS[recipe["kind"]]
    if recipe["kind"] == "encoder_evaluation":  # the command line names the encoder
        recipe["encoder"] = "my-vit"
    config = validate(recipe, schema, name)
    assert validate(yaml.safe_load(to_yaml(config)), schema, name) == config


def test_a_pretraining_that_is_no_stage_is_refused_when_it_is_read() -> None:
    with pytest.raises(UsageError, match=r"warmup_steps \(100\) must be below steps \(60\)"):
        load_recipe("clothing-dino", PretrainRecipe, ["steps=60"])
