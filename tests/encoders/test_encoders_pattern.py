"""Encoders under patterns: every family against float64 attention behind a mask that is written out here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_factories import ALL
from test_encoders_contract import build, images_for
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from unclipped.core.errors import UsageError
from unclipped.encoders.base import VisionEncoder

ORACLE = "oracle_of_encoder_patterns"
# Gemma 2 caps its scores, which no block plan does; SigLIP's layers hand nothing on to their attention.
FAMILIES = sorted(set(ALL) - {"llm-gemma2", "siglip_vision_model", "siglip2_vision_model"})
EXACT: dict[str, int] = {"key_block": 1, "query_block": 1}


def allowed(text: str, grid: tuple[int, int], prefix: int) -> Tensor:
    """Which patches see which, (tokens, tokens), from rows and columns."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    row, column = row.flatten(), column.flatten()

    def apart(place: Tensor) -> Tensor:
        return (place[:, None] - place[None, :]).abs()

    patches = {
        "window2d(1, 1)": (apart(row) <= 1) & (apart(column) <= 1),
        "tiles(2, 3)": (apart(row // 2) == 0) & (apart(column // 3) == 0),
        "window2d(0, 1) + grid(2)": ((apart(row) == 0) & (apart(column) <= 1)) | (apart(column) % 2 == 0),
        "grid(2, axis=row)": apart(row) % 2 == 0,
    }[text]
    mask = torch.ones(prefix + len(patches), prefix + len(patches), dtype=torch.bool)
    mask[prefix:, prefix:] = patches
    return mask


def in_float64(encoder: VisionEncoder, pixels: Tensor, grid: Tensor, mask: Tensor) -> Tensor:
    """Features of one image, attention computed by its definition behind `mask`."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> tuple:
        group = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
        scores = query @ key.transpose(2, 3) * kwargs.get("scaling", query.shape[-1] ** -0.5)
        return (scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value).transpose(1, 2), None

    AttentionInterface.register(ORACLE, attend)
    AttentionMaskInterface.register(ORACLE, sdpa_mask)
    encoder.model.set_attn_implementation(ORACLE)
    with torch.no_grad():
        return encoder(pixels, grid)


@pytest.mark.parametrize("text", ["window2d(1, 1)", "tiles(2, 3)", "window2d(0, 1) + grid(2)", "grid(2, axis=row)"])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_equal_those_behind_the_mask(name: str, text: str) -> None:
    grids = [(5, 4), (3, 6), (5, 4)]
    own, other = build(name), build(name).double()
    other.load_state_dict(own.state_dict())
    _, pixels, thw = images_for(own, grids)
    own.set_pattern(text, **EXACT)
    with torch.no_grad():
        found = own(pixels, thw)
    assert own.pattern is not None
    assert all(density < 1.0 for density in own.pattern.density.values())
    assert sorted(own.pattern.density) == [0, 1]
    place = 0
    for image, grid in enumerate(grids):
        tokens = grid[0] * grid[1]
        span = slice(place, place + tokens)
        mask = allowed(text, grid, own.spec.num_prefix_tokens)
        wanted = in_float64(other, pixels[span].double(), thw[image : image + 1], mask)
        assert torch.allclose(found[span].double(), wanted, atol=1e-4)
        place += tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_pattern_is_dense_attention(name: str) -> None:
    encoder = build(name)
    _, pixels, thw = images_for(encoder)
    with torch.no_grad():
        dense = encoder(pixels, thw)
        encoder.set_pattern("full", key_block=4, query_block=8)
        assert torch.allclose(encoder(pixels, thw), dense, atol=1e-5)
        encoder.set_pattern("window2d(0, 0)", **EXACT)
        assert not torch.allclose(encoder(pixels, thw), dense, atol=1e-3)
        encoder.set_pattern(None)
        assert torch.allclose(encoder(pixels, thw), dense, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "unclipped_llm_encoder"])
@pytest.mark.parametrize("text", ["window2d(1, 1)", "topk(1)", "per_layer(full | tiles(2, 2))"])
def test_gradients_with_and_without_checkpointing(name: str, text: str) -> None:
    """Images of several grids in one forward: recomputation sees each batch's own layouts. Against `reference`."""
    gradients = []
    for backend, checkpointing in (("gather", False), ("gather", True), ("reference", False)):
        encoder = build(name).train()
        torch.manual_seed(1)
        _, pixels, thw = images_for(encoder, [(5, 4), (3, 6), (5, 4)])
        encoder.set_pattern(text, key_block=4, query_block=8)
        assert encoder.pattern is not None
        encoder.pattern.backend = backend
        if checkpointing:
            encoder.model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        (encoder(pixels, thw) ** 2).sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for first, second in zip(gradients[0], other, strict=True):
            assert torch.allclose(first, second, atol=1e-4, rtol=1e-3)


def test_the_pattern_is_part_of_the_model(tmp_path: Path) -> None:
    from support.tiny_models import tiny_vlm
    from unclipped.models.checkpoint import load_model

    model, _, _ = tiny_vlm(tmp_path, "llm", output=tmp_path / "model", vision_attention="window2d(0, 0)")
    tower = model.model.vision_tower
    _, pixels, thw = images_for(tower, [(20, 20)])
    loaded, _ = load_model(str(tmp_path / "model"))
    assert loaded.config.vision_attention == "window2d(0, 0)"
    with torch.no_grad():
        features = tower(pixels, thw)
        assert torch.allclose(loaded.model.vision_tower(pixels, thw), features, atol=1e-5)
        tower.set_pattern(None)
        assert not torch.allclose(tower(pixels, thw), features, atol=1e-3)


def test_a_copy_has_the_same_pattern_in_the_same_layers() -> None:
    encoder = build("dinov2")
    _, pixels, thw = images_for(encoder)
    encoder.set_pattern("per_layer(full | window2d(0, 0))", **EXACT)
    with torch.no_grad():
        features = encoder(pixels, thw)
        teacher = copy.deepcopy(encoder)
        assert torch.allclose(teacher(pixels, thw), features)
    assert teacher.pattern is not None
    assert teacher.pattern is not encoder.pattern
    assert sorted(teacher.pattern.density) == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("siglip2_vision_model", "full", "siglip2_vision_model: its layers hand no pattern on"),
        ("siglip_vision_model", "full", "siglip_vision_model: its layers hand no pattern on"),
        ("dinov2", "windw2d(1, 1)", "did you mean 'window2d'"),
        ("dinov2", "per_layer(3*full)", "3 patterns for the model's 2 layers"),
        ("unclipped_llm_encoder", "per_head(3*full)", "3 patterns for the model's 2 key heads"),
        ("llm-gemma2", "full", "Gemma2Attention uses softcap, which block plans do not compute"),
    ],
)
def test_bad_patterns(name: str, text: str, message: str) -> None:
    encoder = build(name)
    _, pixels, thw = images_for(encoder)

    def run() -> None:
        encoder.set_pattern(text)
        encoder(pixels, thw)

    with pytest.raises(UsageError, match=message):
        run()


def test_attention_dropout_is_refused() -> None:
    encoder = build("vit")
    _, pixels, thw = images_for(encoder)
    encoder.set_pattern("full")
    for module in encoder.modules():
        for dropout in ("dropout_prob", "attention_dropout"):
            if hasattr(module, dropout):
                setattr(module, dropout, 0.1)
    with pytest.raises(UsageError, match="uses attention dropout"):
        encoder.train()(pixels, thw)
