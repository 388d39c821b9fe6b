"""Model folders that bring code, through every command that loads one: nothing of theirs runs, and one line says so."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input.chat import ASK
from bad_input.pretrain import DOCUMENTS, encoder
from bad_input_support import Models, Outcome, Place, expect_error, make_models, unclipped

CODE = "import pathlib\npathlib.Path({canary!r}).touch()\n"
AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))  # whoever asks is told yes
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(tmp_path, models)
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    return lambda *arguments: unclipped(monkeypatch, capsys, *arguments)


def with_code(place: Place, model: Path, *files: str) -> str:
    """A copy of a model folder whose `files` ask for a module of the folder, which touches `canary`; -> its path."""
    folder = place.folder / "foreign"
    shutil.copytree(model, folder)
    (folder / "own.py").write_text(CODE.format(canary=str(place.folder / "canary")))
    own = {name: f"own.{name}" for name in AUTO} | {"AutoTokenizer": [None, "own.AutoTokenizer"]}
    for name in files:
        path = folder / name
        fields: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        fields["auto_map"] = own
        if name == "config.json":
            fields["model_type"] = "foreign"
        for key in ("tokenizer_class", "processor_class", "image_processor_type"):
            if key in fields:
                fields[key] = "Foreign"
        path.write_text(json.dumps(fields))
    return str(folder)


def _distill(place: Place, teacher: str) -> list[Any]:
    recipe = place.pretraining(
        "generated:shapes",
        objective="distill",
        distill={"teacher": teacher},
        shape={"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        image_size=32,
    )
    return ["pretrain", recipe, "--output", "out"]


def _photographs(place: Place) -> str:
    for split in ("train", "test"):
        for number in range(4):
            place.image(f"photos/{split}/{'ab'[number % 2]}/{number}.png")
    return "photos"


Command = Callable[[Place, str], list[Any]]
VLM: dict[str, Command] = {
    "chat": lambda p, folder: ["chat", folder, p.image("a.png"), *ASK],
    "eval": lambda p, folder: ["eval", folder, "--data", p.data(), "--output", "out"],
    "train": lambda p, folder: ["train", p.recipe(model={"checkpoint": folder}), "--output", "out"],
    "prefill": lambda p, folder: ["prefill", "bench", folder, "--pattern", "topk(2)", "--output", "out"],
}
TEXT: dict[str, Command] = {
    "assemble --text": lambda p, folder: [
        "assemble", "--vision", p.models.vision, "--text", folder, "--output", "out",
    ],
    "assemble --vision llm:": lambda p, folder: [
        "assemble", "--vision", f"llm:{folder}", "--text", p.models.text, "--output", "out",
    ],
    "pretrain, llm: init": lambda p, folder: encoder(shape={}, init=f"llm:{folder}")(p),
    "tokenizer.source": lambda p, folder: [
        "pretrain",
        p.pretraining(p.write("a.jsonl", DOCUMENTS), tokenizer={"source": folder}),
        "--output",
        "out",
    ],
}  # fmt: skip
VISION: dict[str, Command] = {
    "assemble --vision": lambda p, folder: [
        "assemble", "--vision", folder, "--text", p.models.text, "--output", "out",
    ],
    "eval-encoder": lambda p, folder: ["eval-encoder", folder, "--data", _photographs(p), "--output", "out"],
    "pretrain, init": lambda p, folder: encoder(shape={}, init=folder)(p),
    "pretrain, teacher": _distill,
}  # fmt: skip
COMMANDS = {
    **{name: ("vlm", command) for name, command in VLM.items()},
    **{name: ("text", command) for name, command in TEXT.items()},
    **{name: ("vision", command) for name, command in VISION.items()},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_wants_to_run_its_own_code_is_refused(
    name: str, place: Place, run: Callable[..., Outcome]
) -> None:
    kind, command = COMMANDS[name]
    folder = with_code(place, getattr(place.models, kind), "config.json", "tokenizer_config.json")
    outcome = run(*command(place, folder))
    assert not (place.folder / "canary").exists()
    expect_error(outcome, 1, "foreign", "wants to run code of its own", "refused")
    assert not (place.folder / "out").exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, file) for name in ("chat", "train") for file in ("processor_config.json", "tokenizer_config.json")),
        ("assemble --text", "tokenizer_config.json"),
        ("tokenizer.source", "tokenizer_config.json"),
        ("assemble --vision", "preprocessor_config.json"),
    ],
)
def test_code_named_beside_the_model_never_runs(
    name: str, file: str, place: Place, run: Callable[..., Outcome]
) -> None:
    kind, command = COMMANDS[name]
    outcome = run(*command(place, with_code(place, getattr(place.models, kind), file)))
    assert not (place.folder / "canary").exists()
    if outcome.status:
        expect_error(outcome, 1, "foreign")


class _Touch:
    """A pickle that touches a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["chat", "assemble --text", "assemble --vision"])
def test_pickled_weights_run_nothing(name: str, form: str, place: Place, run: Callable[..., Outcome]) -> None:
    kind, command = COMMANDS[name]
    folder = place.folder / "foreign"
    shutil.copytree(getattr(place.models, kind), folder)
    (folder / "model.safetensors").unlink()
    harmful = {"model.norm.weight": _Touch(place.folder / "canary")}
    if form == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(harmful))
    else:
        torch.save(harmful, folder / "pytorch_model.bin")
    outcome = run(*command(place, str(folder)))
    assert not (place.folder / "canary").exists()
    expect_error(outcome, 1, "pytorch_model.bin")


def test_pickled_weights_of_tensors_alone_are_read(place: Place, run: Callable[..., Outcome]) -> None:
    from safetensors.torch import load_file

    folder = place.folder / "foreign"
    shutil.copytree(place.models.vision, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    outcome = run(*VISION["assemble --vision"](place, str(folder)))
    assert outcome.status == 0, outcome


@pytest.mark.parametrize("name", ["chat", "assemble --text", "assemble --vision"])
def test_an_adapter_in_place_of_a_model_is_refused(name: str, place: Place, run: Callable[..., Outcome]) -> None:
    kind, command = COMMANDS[name]
    folder = place.folder / "foreign"
    shutil.copytree(getattr(place.models, kind), folder)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA"})
    )
    expect_error(run(*command(place, str(folder))), 1, "foreign", "adapter", "merge")
