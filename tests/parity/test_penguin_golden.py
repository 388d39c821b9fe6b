"""The Penguin-VL encoder against vectors of an independent implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.llm_config import LLMVisionConfig
from unclipped.encoders.llm_encoder import LLMEncoder, LLMVisionModel
from unclipped.encoders.transfer import load_penguin_state


def penguin_model(folder: Path, **changes: object) -> LLMVisionModel:
    fields = json.loads((folder / "encoder_cfg.json").read_text())
    patch_size, num_channels = fields.pop("patch_size"), fields.pop("num_channels")
    theta = fields.pop("rope_theta")
    text = Qwen3Config(**fields)
    options = {"rope_form": "penguin", "rope_theta": theta, **changes}
    return LLMVisionModel(LLMVisionConfig(text, patch_size=patch_size, num_channels=num_channels, **options))


@pytest.fixture(scope="module")
def penguin(golden_folder: Path) -> Path:
    return golden_folder / "penguin"


@pytest.fixture(scope="module")
def encoder(penguin: Path) -> LLMEncoder:
    model = penguin_model(penguin)
    report = load_penguin_state(model, load_file(penguin / "encoder_state.safetensors"))
    assert report.new == report.dropped == ()
    return LLMEncoder(model).eval()


def row_major(h: int, w: int, merge: int) -> Tensor:
    """For each patch of a grid in merge-block order, its row-major index. (h·w,)"""
    index = torch.arange(h * w).view(h // merge, merge, w // merge, merge)
    return index.transpose(1, 2).flatten()  # block row, block column, inner row, inner column


@pytest.mark.parametrize("case", ["one", "merge2"])
@torch.no_grad()
def test_outputs_equal_the_golden_vectors(encoder: LLMEncoder, penguin: Path, case: str) -> None:
    vectors = np.load(penguin / "encoder_io.npz")
    pixels, grid, merge, expected = (
        torch.from_numpy(vectors[f"{case}.{name}"]) for name in ("pixel_values", "grid", "merge", "out")
    )
    packed, start, orders = torch.empty_like(pixels), 0, []
    for (_, h, w), m in zip(grid.tolist(), merge.tolist(), strict=True):
        order = row_major(h, w, m)
        packed[start + order] = pixels[start : start + h * w]
        orders.append((start, h, w, m, order))
        start += h * w
    features = encoder(packed, grid.long())
    merged = []
    for offset, h, w, m, order in orders:
        blocks = features[offset : offset + h * w][order]  # merge-block order again: m·m neighbours are together
        merged.append(blocks.view(h * w // (m * m), m * m, -1).mean(dim=1))
    torch.testing.assert_close(torch.cat(merged), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_axial_form_differs(encoder: LLMEncoder, penguin: Path) -> None:
    axial = penguin_model(penguin, rope_form="axial").eval()
    axial.load_state_dict(encoder.model.state_dict())
    pixels, grid = torch.randn(6, 588), torch.tensor([[1, 2, 3]])
    assert (LLMEncoder(axial)(pixels, grid) - encoder(pixels, grid)).abs().max() > 1e-4


def test_the_parts_of_a_whole_model_are_reported(penguin: Path) -> None:
    state = load_file(penguin / "encoder_state.safetensors")
    whole = {f"model.vision_encoder.vision_encoder.{name}": tensor for name, tensor in state.items()}
    whole["model.vision_projector.readout.0.weight"] = torch.zeros(2, 3)
    report = load_penguin_state(penguin_model(penguin), whole)
    assert report.dropped == ("model.vision_projector.readout.0.weight",)
    assert report.parameters["dropped"] == 6
    assert len(report.taken) == len(state)


def test_misfits_are_listed_before_anything_is_copied(penguin: Path) -> None:
    state = load_file(penguin / "encoder_state.safetensors")
    state["encoder.norm.weight"] = torch.zeros(3)
    state["encoder.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
    del state["embeddings.patch_embedding.bias"]
    model = penguin_model(penguin)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_penguin_state(model, state)
    for part in (
        "missing 1: stem.projection.bias",
        "unexpected 1: decoder.layers.9",
        "misshaped 1: decoder.norm.weight (found (3,), expected (64,))",
    ):
        assert part in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_form_must_be_the_published_one(penguin: Path) -> None:
    with pytest.raises(UsageError, match="rope_form 'penguin'"):
        load_penguin_state(penguin_model(penguin, rope_form="axial"), {})
