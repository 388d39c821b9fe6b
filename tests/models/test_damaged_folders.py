"""Damaged model folders: tensors that are no finite floats, broken files, and random changes of every file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import tiny_encoder, tiny_image
from unclipped.core.errors import CheckpointError, UnclippedError
from unclipped.encoders.build import load_encoder
from unclipped.inference.engine import Engine
from unclipped.models.checkpoint import load_connector, load_model, save_connector
from unclipped.models.language import load_language_model, load_tokenizer


def _load_text(folder: Path) -> None:
    load_language_model(str(folder), "float32")
    load_tokenizer(folder)


def _load_assembled(folder: Path) -> None:
    model, processor = load_model(folder)
    content = [{"type": "image", "image": tiny_image()}, {"type": "text", "text": "what"}]
    Engine(model, processor, device="cpu").generate([[{"role": "user", "content": content}]], max_new_tokens=2)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "assembled": _load_assembled,
    "language model": _load_text,
    "encoder": lambda folder: load_encoder(str(folder)),
    "encoder of a language model": lambda folder: load_encoder(f"llm:{folder}", patch_size=8),
}


@pytest.fixture(scope="module")
def folders(assembled: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    vision = tiny_encoder(tmp_path_factory.mktemp("vision"))
    processor = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
    }
    (vision / "preprocessor_config.json").write_text(json.dumps(processor))
    text = assembled.folder / "text"
    return {
        "assembled": assembled.folder / "model",
        "language model": text,
        "encoder": vision,
        "encoder of a language model": text,
    }


def _copy(folders: dict[str, Path], kind: str, place: Path) -> Path:
    return Path(shutil.copytree(folders[kind], place / "copy"))


def _change_tensor(path: Path, change: Callable[[torch.Tensor], torch.Tensor], part: str = "weight") -> str:
    tensors = load_file(path)
    name = next(name for name in tensors if (name.endswith(part) and "layers" in name) or "layer." in name)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


UNUSABLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": _with(float("nan")),
    "infinity": _with(float("-inf")),
    "int8": lambda tensor: tensor.to(torch.int8),
    "int64": lambda tensor: tensor.to(torch.int64),
    "bool": lambda tensor: tensor > 0,
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "complex64": lambda tensor: tensor.to(torch.complex64),
}


@pytest.mark.parametrize("problem", UNUSABLE)
@pytest.mark.parametrize("kind", LOADERS)
def test_tensors_that_are_no_finite_floats_are_refused_by_name(
    kind: str, problem: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = _copy(folders, kind, tmp_path)
    name = _change_tensor(folder / "model.safetensors", UNUSABLE[problem])
    with pytest.raises(CheckpointError) as caught:
        LOADERS[kind](folder)
    message = str(caught.value)
    assert "\n" not in message
    assert f"({problem})" in message
    assert name in message
    assert str(folder / "model.safetensors") in message


@pytest.mark.parametrize("problem", UNUSABLE)
def test_a_connector_of_no_finite_floats_is_refused_by_name(problem: str, assembled: Any, tmp_path: Path) -> None:
    save_connector(assembled.model, tmp_path / "c")
    path = tmp_path / "c" / "connector.safetensors"
    tensors = load_file(path)
    tensors["projection.0.bias"] = UNUSABLE[problem](tensors["projection.0.bias"])
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"connector\.safetensors: .*projection\.0\.bias \({problem}\)"):
        load_connector(assembled.model, tmp_path / "c")


def test_half_precision_and_tables_of_whole_numbers_are_no_damage(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(folders, "encoder", tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_encoder(str(folder))


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return change


def _file(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def _index(target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config is a list": (_file("config.json", "[]"), r"config\.json: expected a JSON object, found an array"),
    "config is empty": (_file("config.json", ""), r"config\.json: not valid JSON"),
    "config is cut": (_file("config.json", '{"model_type": "qw'), r"config\.json: not valid JSON"),
    "config has a key twice": (_file("config.json", '{"a": 1, "a": 2}'), "the key 'a' occurs twice"),
    "config is deep": (_file("config.json", '{"a":' + "[" * 5000 + "]" * 5000 + "}"), "levels deep"),
    "config has an endless number": (_file("config.json", '{"a": ' + "9" * 5000 + "}"), "digits; the limit is"),
    "unknown attention": (_config(attn_implementation="quick"), r"attn_implementation: unknown attention 'quick'"),
    "attention from elsewhere": (
        _config(_attn_implementation="someone/kernels"),
        "unknown attention 'someone/kernels'",
    ),
    "weights elsewhere": (_config(transformers_weights="../x.safetensors"), "transformers_weights"),
    "a size beyond all": (_config(hidden_size=10**12), "hidden_size is 1000000000000, the limit is"),
    "a size beyond the weights": (_config(vocab_size=60_000_000), "must come from one checkpoint"),
    "layers beyond the weights": (_config(num_hidden_layers=9000, layer_types=None), "9,000 layers"),
    "layers beyond all": (_config(num_hidden_layers=10**7), "num_hidden_layers is 10000000, the limit is 10,000"),
    "a size of text": (_config(hidden_size="wide"), "config.json"),
    "a size of nothing": (_config(num_attention_heads=0), "config.json"),
    "generation config is a list": (_file("generation_config.json", "[]"), r"generation_config\.json: expected"),
    "tokenizer config is a list": (_file("tokenizer_config.json", "[]"), r"tokenizer_config\.json: expected"),
    "tokenizer is empty": (_file("tokenizer.json", "{}"), "tokenizer"),
    "special tokens are a list": (_file("special_tokens_map.json", "[]"), r"special_tokens_map\.json: expected"),
    "index out of the folder": (_index("../outside.safetensors"), "'../outside.safetensors', which is no file of this"),
    "index of a missing file": (_index("gone.safetensors"), "names gone.safetensors, which is missing"),
    "index of a number": (_index(3), "puts model.norm.weight into 3"),  # type: ignore[arg-type]
    "weights are cut": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        r"weights cannot be read \(model\.safetensors: ",
    ),
    "weights announce more than there is": (
        lambda folder: (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        r"weights cannot be read \(model\.safetensors: ",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_gets_one_line(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = _copy(folders, "language model", tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        _load_text(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def _fields(name: str, **changes: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_fields("config.json", image_token_id=7), r"image_token_id 7, the processor's image token '<\|image\|>' is 5"),
        (_fields("generation_config.json", eos_token_id="end"), r"eos_token_id: 'end' is no token of the model"),
        (_fields("generation_config.json", suppress_tokens=[5000]), "suppress_tokens: 5000 is no token of the model"),
        (_fields("generation_config.json", pad_token_id=-1), "pad_token_id: -1 is no token of the model"),
        (_fields("processor_config.json", connector="mlpp"), "connector"),
        (_fields("processor_config.json", image_token="<none>"), "image token '<none>' is not one id"),
        (_fields("config.json", connector_config={"steps": "?"}), r"config\.json"),
        (_fields("config.json", vision_attention="windoow(3)"), "windoow"),
        (_fields("config.json", vision_tile=[0, 1]), "copy"),
        (_fields("config.json", vision_feature_layers=[99]), "copy"),
        (_fields("config.json", text_config=[]), r"config\.json"),
    ],
)
def test_files_of_an_assembled_folder_must_fit_each_other(
    damage: Callable[[Path], Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = _copy(folders, "assembled", tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def _mutated_json(value: Any, choose: random.Random) -> Any:
    """The value with one place in it replaced, removed or doubled."""
    strange = [
        None, True, -1, 0, 7, 2**40, 1e308, "", "x", "../x", [], [1], {}, {"a": 1}, [[]], float("nan"), "é\u0000",
    ]  # fmt: skip
    if isinstance(value, dict) and value and choose.random() < 0.85:
        key = choose.choice(list(value))
        if choose.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: _mutated_json(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.6:
        index = choose.randrange(len(value))
        return [*value[:index], _mutated_json(value[index], choose), *value[index + 1 :]]
    return choose.choice(strange)


def _mutate(folder: Path, choose: random.Random) -> str:
    """Change one file of a folder; -> what was done."""
    path = choose.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = path.read_bytes()
    if path.suffix == ".json" and choose.random() < 0.8:
        changed = json.dumps(_mutated_json(json.loads(content), choose)).encode()
        how = "changed"
    else:
        how = choose.choice(["empty", "cut", "noise", "flipped", "gone"])
        place = choose.randrange(max(1, min(len(content), 4000)))
        changed = {
            "empty": b"",
            "cut": content[:place],
            "noise": choose.randbytes(64),
            "flipped": content[:place] + choose.randbytes(1) + content[place + 1 :],
            "gone": b"",
        }[how]
    path.write_bytes(changed)
    if how == "gone":
        path.unlink()
    return f"{path.name} {how}: {changed[:3000]!r}"


@pytest.mark.parametrize("kind", LOADERS)
def test_random_damage_gives_a_model_or_one_line(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """UNCLIPPED_MUTATIONS sets how many damages are tried on each kind of folder; each has its number as seed."""
    counts: Counter[str] = Counter()
    for seed in range(int(os.environ.get("UNCLIPPED_MUTATIONS", "15"))):
        folder = _copy(folders, kind, tmp_path)
        done = _mutate(folder, random.Random(f"{kind} {seed}"))
        try:
            LOADERS[kind](folder)
            counts["loaded"] += 1
        except UnclippedError as error:
            # A template that loads and fails in use is named by the request.
            unnamed = isinstance(error, CheckpointError) and str(folder) not in str(error)
            if "\n" in str(error) or unnamed:
                pytest.fail(f"{seed}, {done}: {error}")
            counts["refused"] += 1
        except BaseException as error:
            pytest.fail(f"{seed}, {done}: {type(error).__name__} {error}")
        shutil.rmtree(folder)
    print(kind, dict(counts))
    assert counts["refused"]
