"""Reading weights of other code: nothing is run, layouts of training are taken apart, and all else is an error."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unclipped.core.errors import CheckpointError
from unclipped.encoders.importing.files import read_weights

ONE, TWO = torch.ones(2), torch.full((2,), 2.0)
HEADS = {"dino_head.mlp.0.bias": ONE, "ibot_head.last_layer.weight_g": TWO}
TEACHER = {"backbone.norm.bias": ONE, **HEADS}
STUDENT = {name: 0 * value for name, value in TEACHER.items()}


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


BOTH = prefixed("teacher.", TEACHER) | prefixed("student.", STUDENT) | {"dino_loss.center": ONE}
LAYOUTS: dict[str, Any] = {
    "alone": {"norm.bias": ONE},
    "teacher": {"teacher": TEACHER},
    "training": {"model": BOTH, "optimizer": {"state": {}}, "iteration": 3},
    "two dictionaries": {"student": STUDENT, "teacher": TEACHER, "epoch": 3},
    "wrapped": {"model": prefixed("module._fsdp_wrapped_module.teacher.", TEACHER)},
    "wrapped inside": {"teacher": {"backbone._orig_mod.norm._checkpoint_wrapped_module.bias": ONE, **HEADS}},
    "dino": {"teacher": {"module.backbone.norm.bias": ONE, "module.head.mlp.0.bias": ONE}},
    "training with arguments": {"model": {"norm.bias": ONE}, "args": argparse.Namespace(lr=0.1), "epoch": 3},
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_layouts_are_taken_apart(name: str, is_zip: bool, tmp_path: Path) -> None:
    torch.save(LAYOUTS[name], tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    found = read_weights(tmp_path / "a.pth")
    assert {key: value.tolist() for key, value in found.encoder.items()} == {"norm.bias": [1.0, 1.0]}
    if name == "dino":
        assert found.heads["dino_head"].keys() == {"mlp.0.bias"}
    elif "alone" not in name and "arguments" not in name:
        heads = {head: {key: value.tolist() for key, value in named.items()} for head, named in found.heads.items()}
        assert heads == {"dino_head": {"mlp.0.bias": [1, 1]}, "ibot_head": {"last_layer.weight_g": [2, 2]}}
    theirs = "the student's; --weights student takes them"
    expected = {
        "training": {"optimizer": "no weights of the model", "iteration": "no weights of the model"}
        | dict.fromkeys(prefixed("student.", STUDENT), theirs)
        | {"dino_loss.center": "running values of a loss"},
        "two dictionaries": {"epoch": "no weights of the model"} | dict.fromkeys(prefixed("student.", STUDENT), theirs),
        "training with arguments": {"args": "no weights of the model", "epoch": "no weights of the model"},
    }
    assert found.left_out == expected.get(name, {})


@pytest.mark.parametrize("name", ["training", "two dictionaries"])
def test_the_student_is_taken_when_asked_for(name: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[name], tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth", "student")
    assert found.encoder["norm.bias"].tolist() == [0, 0]
    assert found.left_out["teacher.backbone.norm.bias"] == "the teacher's; --weights teacher takes them"


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file({name: value.clone() for name, value in BOTH.items()}, tmp_path / "a.safetensors")
    assert read_weights(tmp_path / "a.safetensors").encoder["norm.bias"].tolist() == [1, 1]


def test_a_classifier_is_no_dino_head(tmp_path: Path) -> None:
    torch.save({"norm.bias": ONE, "head.weight": TWO, "head.1.weight": TWO}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert (found.heads, set(found.encoder)) == ({}, {"norm.bias", "head.weight", "head.1.weight"})


def test_values_beside_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"norm.bias": ONE, "step": 3}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").left_out == {"step": "no tensor"}


class Harmful:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for is_zip in (True, False):
        torch.save({"model": {"norm.bias": ONE}, "more": Harmful()}, "a.pth", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(CheckpointError, match=r"a\.pth: asks to run 'posix\.mkdir' .* refused; save its tensors"):
            read_weights("a.pth")
    assert not (tmp_path / "harmed").exists()


def bytes_of(value: Any, path: Path) -> bytes:
    torch.save(value, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as weights"),
        (b"hello, this is text", "cannot be read as weights; expected a .pth"),
        ("cut", "cannot be read as weights.*whole: fetch or copy it again"),
        ([1, 2], "holds a list, not named tensors"),
        (ONE, "holds a Tensor, not named tensors"),
        ({}, "no tensors found; the file holds nothing"),
        ({"epoch": 3, "args": "x"}, "no tensors found; the file holds epoch, args"),
        ({"model": {}}, "no tensors found; the file holds model"),
        ({"model": {"epoch": 3}}, "no tensors found; the file holds epoch"),
        ({"norm.bias": ONE, "module.norm.bias": TWO}, "two tensors named norm.bias"),
    ],
)
def test_what_is_no_file_of_weights(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    if content == "cut":
        whole = bytes_of({"norm.bias": torch.zeros(5000)}, path)
        path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stored", "side", "message"),
    [
        ({"norm.bias": ONE}, "teacher", "holds no teacher .* leave --weights out"),
        ({"teacher": TEACHER}, "student", "it has a teacher: --weights teacher"),
        (prefixed("teacher.", TEACHER), "student", "holds no student; it has a teacher: --weights teacher"),
    ],
)
def test_a_side_that_is_not_there(stored: Any, side: str, message: str, tmp_path: Path) -> None:
    torch.save(stored, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "a.pth", side)


def test_folders_missing_files_and_broken_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; .* needs no import"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file; expected a \.pth"):
        read_weights(tmp_path / "nowhere.pth")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read"):
        read_weights(tmp_path / "a.safetensors")
