"""Folders: whole or not at all, loaded strictly; the connector alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.prompts import ask, batch
from support.tiny_models import tiny_lm, tiny_vlm
from unclipped.core.errors import CheckpointError, UnclippedError, UsageError
from unclipped.models.checkpoint import load_connector, load_model, save_connector, save_model


def test_round_trip(assembled: Any) -> None:
    model, processor = load_model(assembled.folder / "model")
    assert not model.training
    ours, theirs = assembled.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = batch(processor, ask("what", (16, 32)))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, assembled.model(**inputs).logits)
    assert model.generation_config.suppress_tokens == [processor.image_token_id]


def test_tied_weights_are_written_once_and_stay_tied_in_bfloat16(assembled: Any) -> None:
    assert "lm_head.weight" not in load_file(assembled.folder / "model" / "model.safetensors")
    model, _ = load_model(assembled.folder / "model", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_decoder_with_another_embedding_name_stays_tied(tmp_path: Path) -> None:
    tiny_vlm(tmp_path, "dinov2", family="gpt2", output=tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.language_model.wte.weight


@pytest.fixture
def folder(assembled: Any, tmp_path: Path) -> Path:
    """A copy of the assembled folder, to be damaged."""
    shutil.copytree(assembled.folder / "model", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("part", ["vision_tower", "connector", "language_model"])
def test_missing_extra_and_misshaped_tensors_are_listed(folder: Path, part: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if part in name and tensors[name].dim() == 2 and "embed" not in name]
    missing, misshaped = names[0], names[1]
    del tensors[missing]
    tensors[misshaped] = torch.zeros(3, 2)
    tensors[f"model.{part}.surplus"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    for expected in (missing, f"{misshaped} (found (3, 2), expected", f"model.{part}.surplus", str(folder)):
        assert expected in message


def test_damaged_folders(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


def test_other_models_are_refused(tmp_path: Path) -> None:
    tiny_lm(tmp_path)
    with pytest.raises(CheckpointError, match="holds a 'qwen3', not an assembled model"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "nowhere")


def test_saving_is_whole_or_nothing(assembled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(type(assembled.processor), "save_pretrained", fail)
        with pytest.raises(UnclippedError, match=f"cannot write {target}: No space left on device"):
            save_model(assembled.model, assembled.processor, target)
    assert list(tmp_path.iterdir()) == []
    save_model(assembled.model, assembled.processor, target)
    with pytest.raises(UsageError, match="is not empty"):
        save_model(assembled.model, assembled.processor, target)
    with monkeypatch.context() as patch:
        patch.setattr(type(assembled.processor), "save_pretrained", fail)
        with pytest.raises(UnclippedError):
            save_model(assembled.model, assembled.processor, target, overwrite=True)
    load_model(target)
    save_model(assembled.model, assembled.processor, target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        save_model(assembled.model, None, tmp_path / "file")


def test_the_connector_alone(tmp_path: Path) -> None:
    connector = "pixel_shuffle(2) + standardise + mlp(2)"
    first, _, _ = tiny_vlm(tmp_path / "a", "dinov2", connector=connector, seed=0)
    second, _, _ = tiny_vlm(tmp_path / "b", "dinov2", connector=connector, seed=1)
    first.model.connector.set_standardisation(torch.full((128,), 0.5), torch.full((128,), 2.0))
    save_connector(first, tmp_path / "connector")
    assert json.loads((tmp_path / "connector" / "connector.json").read_text()) == {
        "connector": "pixel_shuffle(2) + standardise + mlp(2)",
        "vision_hidden": 32,
        "text_hidden": 32,
    }
    save_model(first, None, tmp_path / "whole")
    again = type(first).from_pretrained(tmp_path / "whole")
    assert again.model.connector.std.tolist() == [2.0] * 128
    before = {name: tensor.clone() for name, tensor in second.state_dict().items() if "connector" not in name}
    load_connector(second, tmp_path / "connector")
    ours = first.model.connector.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in second.model.connector.state_dict().items())
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connector": "linear"}, r"connector is 'mlp\(2\)', the model's connector has 'linear'"),
        ({"lm_overrides": {"hidden_size": 48}}, "text_hidden is 32, the model's connector has 48"),
        ({"feature_layers": [0, 1]}, "vision_hidden is 32, the model's connector has 64"),
    ],
)
def test_a_connector_of_another_model_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    first, _, _ = tiny_vlm(tmp_path / "a", "dinov2")
    save_connector(first, tmp_path / "connector")
    second, _, _ = tiny_vlm(tmp_path / "b", "dinov2", **options)
    with pytest.raises(CheckpointError, match=message):
        load_connector(second, tmp_path / "connector")


def test_damaged_connectors(assembled: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable connector"):
        load_connector(assembled.model, tmp_path)
    save_connector(assembled.model, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "connector.safetensors")
    tensors["surplus"] = tensors.pop("projection.0.bias")
    save_file(tensors, tmp_path / "c" / "connector.safetensors")
    with pytest.raises(CheckpointError, match=r"missing 1: projection\.0\.bias; unexpected 1: surplus"):
        load_connector(assembled.model, tmp_path / "c")
    with pytest.raises(UsageError, match="has no connector"):
        save_connector(assembled.model.lm_head, tmp_path / "d")
