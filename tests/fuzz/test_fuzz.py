"""Fuzzing of all that comes from outside: recipes, rows, model folders, tar shards. Results, or one line of ours."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fuzz.mutations import changed, damaged, fuzz, outcome, tar_member
from support.tiny_models import tiny_encoder, tiny_image, tiny_tokenizer, tiny_vlm
from unclipped.data.config import SourceConfig
from unclipped.data.sample import Sample
from unclipped.data.sources import open_source
from unclipped.encoders.build import load_encoder
from unclipped.encoding.examples import encode_sample
from unclipped.models.checkpoint import load_model
from unclipped.models.language import load_language_model, load_tokenizer
from unclipped.recipes.loading import apply_overrides, builtin_names, read_recipe
from unclipped.recipes.schema import SCHEMAS
from unclipped.recipes.validation import load_recipe, to_yaml, validate

RECIPES = {name: read_recipe(name) for name in builtin_names()}

TALK = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]
ROWS: dict[str, dict[str, Any]] = {
    "qa": {"id": "1", "image": "a.png", "question": "q", "answers": ["a", "b"], "choices": ["a", "b"], "category": "c"},
    "llava": {"id": "1", "image": "a.png", "conversations": TALK},
    "sharegpt": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"},
        ],
        "images": ["a.png"],
    },
    "cauldron": {"images": ["a.png"], "texts": [{"user": "q", "assistant": "a", "source": "s"}]},
    "pairs": {"image": "a.png", "caption": "a cat"},
    "text": {"text": "some text"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_image(8, 8).save(folder / "a.png")
    return folder


def schema_of(name: str) -> Any:
    return SCHEMAS[RECIPES[name].get("kind", "train")]


@fuzz
@given(st.data())
def test_recipes(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RECIPES)))
    recipe = data.draw(changed(RECIPES[name]))
    config = outcome(lambda: validate(recipe, schema_of(name), "recipe") if isinstance(recipe, dict) else None)
    if config is not None:
        again = outcome(lambda: validate(yaml.safe_load(to_yaml(config)), schema_of(name), "recipe"))
        assert again is not None
        assert to_yaml(again) == to_yaml(config)  # what is written next to a result is what ran


@fuzz
@given(st.data())
def test_recipe_files(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RECIPES)))
    path = folder / "recipe.yaml"
    path.write_bytes(data.draw(damaged(yaml.safe_dump(RECIPES[name], sort_keys=False).encode())))
    outcome(lambda: load_recipe(str(path), schema_of(name)))


@fuzz
@given(st.data())
def test_overrides(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RECIPES)))
    text = data.draw(damaged(b"stages.0.steps=[1, {a: b}]") | st.binary(max_size=30)).decode("utf-8", "surrogateescape")

    def run() -> None:
        validate(apply_overrides(RECIPES[name], [text]), schema_of(name), "recipe")

    outcome(run)


def first_of(path: Path) -> Sample:
    """The first sample of a file, under a name that does not depend on the file's."""
    found = open_source(SourceConfig(source=str(path), images=str(path.parent)))[0]
    assert isinstance(found, Sample)
    return dataclasses.replace(found, id="first")


def read_all(path: Path) -> None:
    tokenizer = tiny_tokenizer()
    source = open_source(SourceConfig(source=str(path), images=str(path.parent)))
    for index in range(source.length or 0):
        sample = source[index]
        for image in sample.images:
            assert image.source
        outcome(lambda sample=sample: encode_sample(sample.without_images(), tokenizer))


@fuzz
@given(st.data())
def test_rows(folder: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(ROWS)))
    good = json.dumps(ROWS[kind])
    row = json.dumps(data.draw(changed(ROWS[kind])))
    raw = data.draw(st.just(row.encode()) | damaged(row.encode()))
    as_array = data.draw(st.booleans())
    content = b"[" + b",".join([good.encode(), raw]) + b"]" if as_array else good.encode() + b"\n" + raw + b"\n"
    path = folder / ("rows.json" if as_array else "rows.jsonl")
    path.write_bytes(content)
    outcome(lambda: read_all(path))
    alone = folder / ("alone.json" if as_array else "alone.jsonl")
    alone.write_bytes(b"[" + good.encode() + b"]" if as_array else good.encode() + b"\n")
    first = outcome(lambda: first_of(path))
    assert first in (None, outcome(lambda: first_of(alone)))  # what comes behind a row does not change it


@fuzz
@given(st.data())
def test_tar_shards(folder: Path, data: st.DataObject) -> None:
    stream = io.BytesIO()
    tiny_image(4, 4).save(stream, "PNG")
    members = [("a.png", stream.getvalue()), ("a.txt", b"one"), ("b.png", stream.getvalue()), ("b.json", b'{"c": "d"}')]
    content = b"".join(data.draw(tar_member(name, held)) for name, held in members) + bytes(1024)
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    path = folder / f"{data.draw(st.integers(0, 1 << 40))}.tar"
    path.write_bytes(content)

    def run() -> None:
        source = open_source(SourceConfig(source=str(path)))
        for index in range(source.length or 0):
            outcome(lambda index=index: source[index])

    outcome(run)
    path.unlink()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_vlm(folder / "parts", output=folder / "vlm")
    tiny_encoder(folder / "encoder")
    return folder


LOADERS = {
    "vlm": lambda path: load_model(path),
    "parts/text": lambda path: (load_language_model(str(path), "auto"), load_tokenizer(path)),
    "encoder": lambda path: load_encoder(str(path)),
}


@fuzz
@given(st.data())
def test_model_folders(models: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(LOADERS)))
    name = data.draw(st.sampled_from(sorted(path.name for path in (models / kind).iterdir())))
    content = (models / kind / name).read_bytes()
    work = models / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(models / kind, work)
    if name.endswith(".json") and name != "tokenizer.json" and data.draw(st.booleans()):
        (work / name).write_text(json.dumps(data.draw(changed(json.loads(content)))))
    else:
        (work / name).write_bytes(data.draw(damaged(content)))
    outcome(lambda: LOADERS[kind](work))


def test_the_fuzz_would_see_a_traceback_and_a_hang() -> None:
    def hang() -> None:
        while True:
            pass

    from fuzz import mutations

    with pytest.raises(KeyError):
        outcome(lambda: {}["x"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutations.within.__wrapped__, "__defaults__", (1,))
        with pytest.raises(mutations.TooSlow):
            outcome(hang)
