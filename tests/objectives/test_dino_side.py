"""DINO heads beside an encoder: scores of original heads against NumPy, files there and back, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from support.original_vit import Computed, Draw
from unclipped.core.errors import CheckpointError
from unclipped.objectives.dino_heads import DinoHead
from unclipped.objectives.dino_side import DinoHeads, head_from_original, load_dino_heads, save_dino_heads, sizes_of

SIZES = {"width": 12, "hidden": 20, "bottleneck": 8, "prototypes": 15}


def original(**changes: Tensor) -> dict[str, Tensor]:
    return Draw(0).head(12, 20, 8, 15) | changes


def renamed(tensors: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The last layer as torch stores it: with the older weight norm, the newer one, or the product alone."""
    tensors = dict(tensors)
    if form == "older":
        return tensors
    gains, directions = (tensors.pop(f"last_layer.weight_{letter}") for letter in "gv")
    if form == "product":
        return tensors | {"last_layer.weight": torch._weight_norm(directions, gains, 0)}
    names = ("last_layer.parametrizations.weight.original0", "last_layer.parametrizations.weight.original1")
    return tensors | dict(zip(names, (gains, directions), strict=True))


@pytest.mark.parametrize("form", ["older", "newer", "product"])
@torch.no_grad()
def test_scores_are_those_of_the_original(form: str) -> None:
    tensors, features = original(), torch.randn(7, 12, dtype=torch.float64)
    head = head_from_original("file", renamed(tensors, form), 12)
    assert isinstance(head, DinoHead)
    assert sizes_of(head) == SIZES
    scores = head.double()(features)
    np.testing.assert_allclose(scores.numpy(), Computed(tensors).scores(features.numpy()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", ["older", "newer"])
@torch.no_grad()
def test_names_are_those_that_torch_gives(form: str) -> None:
    wrap = torch.nn.utils.weight_norm if form == "older" else torch.nn.utils.parametrizations.weight_norm
    last = wrap(nn.Linear(8, 15, bias=False))
    state = {name: value for name, value in original().items() if name.startswith("mlp.")}
    state |= {f"last_layer.{name}": value for name, value in last.state_dict().items()}
    head = head_from_original("file", state, 12)
    assert isinstance(head, DinoHead)
    inner = nn.functional.normalize(torch.randn(3, 8), dim=-1)
    weight = head.direction * (head.gain / head.direction.norm(dim=1))[:, None]
    torch.testing.assert_close(inner @ weight.T, last(inner))


@pytest.mark.parametrize("kept", ["both", "dino", "ibot"])
def test_heads_come_back_from_their_folder(kept: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = DinoHead(**SIZES) if kept != "ibot" else None
    second = DinoHead(**(SIZES | {"bottleneck": 4, "prototypes": 9})) if kept != "dino" else None
    heads = DinoHeads(first, second, torch.randn(1, 1, 12) if kept != "ibot" else None)
    save_dino_heads(tmp_path, heads)
    found = load_dino_heads(tmp_path)
    assert found.named_heads().keys() == heads.named_heads().keys()
    expected = heads.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert (found.mask_token is None) == (kept == "ibot")
    assert {path.name for path in (tmp_path / "dino_heads").iterdir()} == {"dino_heads.json", "dino_heads.safetensors"}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (original(**{"mlp.6.weight": torch.zeros(8, 8), "mlp.6.bias": torch.zeros(8)}), "layers 0, 2, 4, 6; heads"),
        ({"mlp.weight": torch.zeros(8, 12)}, "layers none; heads here have three"),
        (original(**{"mlp.1.running_mean": torch.zeros(20)}), "without batch norms"),
    ],
)
def test_heads_of_another_kind_have_no_place(tensors: dict[str, Tensor], reason: str) -> None:
    found = head_from_original("file", tensors, 12)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize(
    ("tensors", "width", "message"),
    [
        (original(), 13, r"file: .*misshaped 1: mlp\.0\.weight \(found \(20, 12\), expected \(20, 13\)\)"),
        ({k: v for k, v in original().items() if k != "last_layer.weight_g"}, 12, r"missing 1: last_layer\.weight_g"),
        ({k: v for k, v in original().items() if "last" not in k}, 12, r"missing 2: last_layer\.weight_g, last_l"),
        (original(**{"last_layer.weight_g": torch.ones(3, 1)}), 12, r"weight_g \(found \(3, 1\), expected \(15, 1\)\)"),
        (original(**{"last_layer.weight_v": torch.ones(15, 9)}), 12, r"weight_v \(found \(15, 9\), expected \(15, 8"),
        (original(**{"last_layer.bias": torch.ones(15)}), 12, r"unexpected 1: last_layer\.bias"),
        ({k: v for k, v in original().items() if k != "mlp.2.bias"}, 12, r"missing 1: mlp\.2\.bias"),
    ],
)
def test_misfits_are_listed(tensors: dict[str, Tensor], width: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        head_from_original("file", tensors, width)


def no_json(side: Path) -> None:
    (side / "dino_heads.json").unlink()


def other_sizes(side: Path) -> None:
    fields: dict[str, Any] = json.loads((side / "dino_heads.json").read_text())
    fields["heads"]["dino_head"]["hidden"] = 21
    (side / "dino_heads.json").write_text(json.dumps(fields))


def other_name(side: Path) -> None:
    text = (side / "dino_heads.json").read_text()
    (side / "dino_heads.json").write_text(text.replace("dino_head", "dino_haed"))


def no_size(side: Path) -> None:
    (side / "dino_heads.json").write_text('{"heads": {"dino_head": {"hidden": 3}}, "mask_token": null}')


def fewer_tensors(side: Path) -> None:
    tensors = load_file(side / "dino_heads.safetensors")
    del tensors["dino_head.gain"]
    save_file(tensors, side / "dino_heads.safetensors")


def cut(side: Path) -> None:
    (side / "dino_heads.safetensors").write_bytes(b"no")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_json, r"no dino_heads/dino_heads\.json in this folder; expected .*objective dinov2, or `unclipped import-"),
        (other_sizes, r"misshaped .*dino_head\.mlp\.0\.bias \(found \(20,\), expected \(21,\)\)"),
        (other_name, r"not the description of DINO heads .*no such head: dino_haed"),
        (no_size, "not the description of DINO heads"),
        (fewer_tensors, r"missing 1: dino_head\.gain"),
        (cut, "cannot be read"),
    ],
)
def test_spoilt_folders(spoil: Any, message: str, tmp_path: Path) -> None:
    save_dino_heads(tmp_path, DinoHeads(DinoHead(**SIZES), None, None))
    spoil(tmp_path / "dino_heads")
    with pytest.raises(CheckpointError, match=message) as error:
        load_dino_heads(tmp_path)
    assert str(tmp_path) in str(error.value)
