"""A position table brought to another side: the same features as before, and a folder that declares the side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from unclipped.core.errors import UsageError
from unclipped.encoders.base import VisionEncoder
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.positions import resize_positions

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WITH_TABLE = ("vit", "dinov2", "dinov2_with_registers", "vit_mae")


def fresh(family: str) -> VisionEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(AutoConfig.for_model(family, **WIDTHS)).eval()
    model: Any = encoder.model
    model.embeddings.position_embeddings.data.normal_()  # whatever a family starts with, here it matters
    return encoder


def features(encoder: VisionEncoder, side: int) -> torch.Tensor:
    grid = side // 8
    patches = torch.randn(grid * grid, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return encoder(patches, torch.tensor([[1, grid, grid]]))


@pytest.mark.parametrize("family", WITH_TABLE)
@pytest.mark.parametrize("side", [16, 56])
def test_features_are_those_of_the_family_s_own_interpolation(family: str, side: int, tmp_path: Path) -> None:
    encoder = fresh(family)
    model: Any = encoder.model
    table = model.embeddings.position_embeddings.detach().clone()
    was_parameter = isinstance(model.embeddings.position_embeddings, torch.nn.Parameter)
    names, before = list(encoder.state_dict()), features(encoder, side)
    assert resize_positions(encoder, side) == (4, side // 8)
    torch.testing.assert_close(features(encoder, side), before, atol=1e-5, rtol=1e-5)

    new = model.embeddings.position_embeddings
    expected = F.interpolate(
        table[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2), size=(side // 8, side // 8), mode="bicubic",
        align_corners=False, antialias=family == "dinov2_with_registers",
    ).permute(0, 2, 3, 1).reshape(1, -1, 16)  # fmt: skip
    torch.testing.assert_close(new[:, 1:], expected)
    assert torch.equal(new[:, :1], table[:, :1])
    assert isinstance(new, torch.nn.Parameter) is was_parameter
    assert list(encoder.state_dict()) == names
    assert encoder.spec.image_size == (side, side)
    assert resize_positions(encoder, side) is None

    model.save_pretrained(tmp_path)
    loaded, _ = load_encoder(str(tmp_path))
    assert loaded.spec.image_size == (side, side)
    assert torch.equal(features(loaded, side), features(encoder, side))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    noise = {"noise": torch.arange((side // 8) ** 2).expand(2, -1)} if family == "vit_mae" else {}
    with torch.no_grad():  # without any word about interpolation
        plain = AutoModel.from_pretrained(tmp_path).eval()(images, **noise).last_hidden_state
        torch.testing.assert_close(plain, model(images, **noise).last_hidden_state)


def test_gradients_reach_the_new_table_only() -> None:
    encoder = fresh("dinov2")
    model: Any = encoder.model
    old = model.embeddings.position_embeddings
    resize_positions(encoder, 48)
    grid = torch.tensor([[1, 6, 6]])
    encoder(torch.randn(36, 192), grid).square().sum().backward()
    assert old.grad is None
    assert model.embeddings.position_embeddings.grad.abs().sum() > 0


def test_a_frozen_table_stays_frozen() -> None:
    encoder = fresh("vit").requires_grad_(False)
    resize_positions(encoder, 48)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_an_encoder_without_a_table_is_left_as_it_is() -> None:
    text = {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    encoder = build_encoder(AutoConfig.for_model("unclipped_llm_encoder", patch_size=8, text_config=text))
    assert resize_positions(encoder, 64) is None
    assert encoder.spec.image_size is None


def test_a_side_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(UsageError, match=r"image_size: 44 px are no multiple of the patch of 8×8 px"):
        resize_positions(fresh("vit"), 44)
