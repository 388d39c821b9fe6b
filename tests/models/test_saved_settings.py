"""What a saved folder keeps: every public setting of processor, tokenizer, model and generation, and left padding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

from support.prompts import ask, batch
from support.tiny_models import tiny_tokenizer, tiny_vlm
from unclipped.core.errors import CheckpointError
from unclipped.models.checkpoint import load_model, save_model
from unclipped.models.configuration import UnclippedConfig
from unclipped.models.modeling import UnclippedForConditionalGeneration

CONVERSATIONS = (ask("what", (16, 16)), ask("how many red circle this is the word", (24, 16)))


@pytest.fixture(params=["no padding side saved", "right padding saved", "as saved now"])
def folder(request: Any, assembled: Any, tmp_path: Path) -> Path:
    """The assembled folder as it is saved now, and as it was saved before."""
    copy = Path(shutil.copytree(assembled.folder / "model", tmp_path / "model"))
    path = copy / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("padding_side") == "left"
    if request.param != "as saved now":
        extra = {"padding_side": "right"} if request.param == "right padding saved" else {}
        path.write_text(json.dumps({**fields, **extra}))
    return copy


def test_a_batch_equals_its_rows_with_the_folder_as_loaded(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def answers(*conversations: Any) -> list[list[int]]:
        inputs = batch(processor, *conversations)
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()

    assert answers(*CONVERSATIONS) == [answers(conversation)[0] for conversation in CONVERSATIONS]
    assert load_model(folder)[1].tokenizer.padding_side == "left"


def test_a_pipeline_of_batches_equals_one_of_rows(folder: Path) -> None:
    ask_all = pipeline("image-text-to-text", model=str(folder), device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 6, "return_full_text": False}
    together = ask_all(list(CONVERSATIONS), batch_size=2, **options)
    alone = [ask_all([conversation], **options)[0] for conversation in CONVERSATIONS]
    assert [row[0]["generated_text"] for row in together] == [row[0]["generated_text"] for row in alone]


def test_a_folder_saved_now_pads_left_in_the_tokenizer_alone(assembled: Any) -> None:
    assert AutoTokenizer.from_pretrained(assembled.folder / "model").padding_side == "left"


def _public(value: Any) -> dict[str, Any]:
    """Settings of an object by name: numbers, texts, and lists and mappings of them."""
    plain = (str, int, float, bool, type(None), list, tuple, dict)
    names = [name for name in dir(value) if not name.startswith("_") and name not in _PLACES]
    return {name: found for name in names if isinstance(found := getattr(value, name, None), plain)}


# Where an object came from, and not what it does.
_PLACES = ("name_or_path", "init_kwargs", "files_loaded", "init_inputs", "transformers_version", "architectures")


def _settings(model: Any, processor: Any) -> dict[str, Any]:
    tower = model.model.vision_tower
    return {
        "processor": {**_public(processor), "dict": processor.to_dict()},
        "tokenizer": _public(processor.tokenizer),
        "vocabulary": processor.tokenizer.get_vocab(),
        "backend": json.loads(processor.tokenizer.backend_tokenizer.to_str()),
        "images": processor.image_processor.image_rule.model_dump(),
        "generation": {**model.generation_config.to_dict(), "transformers_version": None, "_from_model_config": None},
        "config": {**model.config.to_dict(), "transformers_version": None, "architectures": None, "_name_or_path": ""},
        "attention": [part._attn_implementation for part in (model.config.vision_config, model.config.text_config)],
        "tower": {**_public(tower), "pattern": None, "spec": tower.spec},
        "pattern": str(tower.pattern.given),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
    }


@pytest.mark.parametrize("tokenizer", ["compact", "bare"])
def test_every_setting_survives_saving(tokenizer: str, tmp_path: Path) -> None:
    own = None if tokenizer == "compact" else tiny_tokenizer(compact=False, pad=False)
    if own is not None:
        own.clean_up_tokenization_spaces = True
        own.model_max_length = 77
    model, processor, _ = tiny_vlm(
        tmp_path,
        "dinov2",
        tokenizer=own,
        output=tmp_path / "model",
        vision_attention="window2d(2, 2)",
        vision_tile=(2, 2),
        image={"background": (1, 2, 3), "max_pixels": 4321, "rule": "pad"},
    )
    before = _settings(model, processor)
    for kind, loaded in {
        "load_model": load_model(tmp_path / "model"),
        "auto": (
            AutoModelForImageTextToText.from_pretrained(tmp_path / "model"),
            AutoProcessor.from_pretrained(tmp_path / "model"),
        ),
    }.items():
        after = _settings(*loaded)
        for part, expected in before.items():
            found = after[part]
            if isinstance(expected, dict):
                different = {
                    key: (expected.get(key, "-"), found.get(key, "-"))
                    for key in expected.keys() | found.keys()
                    if expected.get(key, "-") != found.get(key, "-")
                }
                assert not different, f"{kind}, {part}: {different}"
            assert found == expected, f"{kind}, {part}"
    assert torch.equal(model.lm_head.weight, load_model(tmp_path / "model")[0].lm_head.weight)


def test_a_pattern_and_a_tile_set_on_the_tower_are_saved(tmp_path: Path) -> None:
    model, processor, _ = tiny_vlm(tmp_path, "dinov2")
    tower = model.model.vision_tower
    tower.set_pattern("window2d(2, 2) + grid(2)")
    tower.set_tile((2, 1))
    save_model(model, processor, tmp_path / "one")
    again, _ = load_model(tmp_path / "one")
    assert str(again.model.vision_tower.pattern.given) == str(tower.pattern.given)
    assert again.model.vision_tower.tile == (2, 1)
    tower.set_pattern(None)
    tower.set_tile(None)
    save_model(model, processor, tmp_path / "two")
    again, _ = load_model(tmp_path / "two")
    assert again.model.vision_tower.pattern is None
    assert again.model.vision_tower.tile is None


@pytest.mark.parametrize("fields", ["language model", {}, {"model_type": "unclipped"}, {"model_type": "vit"}])
def test_a_folder_of_another_model_is_refused_before_anything_is_built(
    fields: Any, assembled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = assembled.folder / "text"
    if fields != "language model":
        folder = tmp_path
        (folder / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(UnclippedForConditionalGeneration, "__init__", lambda *_: pytest.fail("a model was built"))
    for loader in (UnclippedForConditionalGeneration, UnclippedConfig):
        with pytest.raises(CheckpointError, match=r"expected an assembled model.*unclipped assemble"):
            loader.from_pretrained(folder)
