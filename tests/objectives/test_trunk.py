"""The trunk: features as the encoder gives them, masks, fresh weights, saving, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEModel

from unclipped.core.errors import UsageError
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.vit_mae_init import initialise_vit_mae
from unclipped.images.config import ImageRule
from unclipped.images.patches import patchify
from unclipped.objectives.trunk import FAMILIES, Trunk, build_trunk, save_trunk, take

SMALL: dict[str, Any] = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def small_trunk(family: str = "vit", *, maskable: bool = True) -> Trunk:
    torch.manual_seed(0)
    if family == "unclipped_llm_encoder":
        shape: dict[str, Any] = {"model_type": family, "patch_size": 8, "text_config": DECODER}
        return build_trunk(shape, image_size=None, maskable=maskable).eval()
    return build_trunk({"model_type": family} | SMALL, image_size=32, maskable=maskable).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_encoders_own_at_any_size(family: str) -> None:
    trunk = small_trunk(family)
    for height, width in ((32, 32), (16, 24)):
        pixels = torch.randn(2, 3, height, width)
        output = trunk(pixels)
        grid = torch.tensor([[1, height // 8, width // 8]] * 2)
        expected = trunk.encoder(patchify(pixels, (8, 8)).flatten(0, 1), grid).unflatten(0, (2, -1))
        torch.testing.assert_close(output.patches, expected)
        if trunk.encoder.spec.num_prefix_tokens:
            assert not torch.allclose(output.pooled, output.patches.mean(dim=1))
        else:
            torch.testing.assert_close(output.pooled, output.patches.mean(dim=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_under_the_mask_is_not_seen(family: str) -> None:
    trunk = small_trunk(family)
    pixels, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :4] = True  # the upper eight rows
    other = pixels.clone()
    other[0, :, :8] += 1
    masked = trunk(pixels, mask)
    torch.testing.assert_close(masked.patches, trunk(other, mask).patches)
    torch.testing.assert_close(masked.patches[1], trunk(pixels).patches[1])
    assert not torch.allclose(masked.patches[0], trunk(pixels).patches[0])
    masked.patches[..., 0].sum().backward()
    assert trunk.mask_token is not None
    assert trunk.mask_token.grad is not None
    assert trunk.mask_token.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", [(32, 32), (16, 24)])
def test_all_patches_chosen_in_any_order_are_the_whole_image(family: str, side: tuple[int, int]) -> None:
    trunk = small_trunk(family)
    pixels = torch.randn(2, 3, *side)
    whole = trunk(pixels)
    keep = torch.rand(2, whole.patches.shape[1]).argsort(dim=1)
    chosen = trunk(pixels, keep=keep)
    torch.testing.assert_close(chosen.patches, take(whole.patches, keep))
    torch.testing.assert_close(chosen.pooled, whole.pooled)
    torch.testing.assert_close(chosen.prefix, whole.prefix)
    assert chosen.prefix.shape[1] == trunk.encoder.spec.num_prefix_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_that_are_not_chosen_are_not_seen(family: str) -> None:
    trunk = small_trunk(family)
    pixels, keep = torch.randn(1, 3, 32, 32, requires_grad=True), torch.tensor([[9, 4, 15]])
    chosen = trunk(pixels, keep=keep)
    assert chosen.patches.shape == (1, 3, 32)
    chosen.patches.square().sum().backward()
    assert pixels.grad is not None
    touched = patchify(pixels.grad, (8, 8))[0].any(dim=1).nonzero().flatten().tolist()
    assert touched == [4, 9, 15]


def test_masked_autoencoders_of_transformers_see_the_same_chosen_patches() -> None:
    torch.manual_seed(0)
    fields = {**SMALL, "image_size": 32, "intermediate_size": 48}
    reference = initialise_vit_mae(ViTMAEModel(ViTMAEConfig(**fields, mask_ratio=0.75))).eval()
    encoder = build_encoder(ViTMAEConfig(**fields))
    encoder.model.load_state_dict(reference.state_dict())
    pixels, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    chosen = Trunk(encoder).eval()(pixels, keep=noise.argsort(dim=1)[:, :4])
    expected = reference(pixels, noise=noise).last_hidden_state
    torch.testing.assert_close(torch.cat((chosen.prefix, chosen.patches), dim=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_trunk_loads_as_an_encoder(family: str, tmp_path: Path) -> None:
    trunk = small_trunk(family)
    rule = ImageRule(rule="squash", size=(32, 32), patch_size=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_trunk(trunk, tmp_path / "model", rule)
    encoder, _ = load_encoder(str(tmp_path / "model"))
    assert encoder.spec.mean == (0.1, 0.2, 0.3)
    patches, grid = torch.randn(16, 192), torch.tensor([[1, 4, 4]])
    torch.testing.assert_close(encoder(patches, grid), trunk.encoder(patches, grid))


def test_positions_are_initialised() -> None:
    table: Any = small_trunk("dinov2").encoder.model.get_submodule("embeddings")
    assert 0.01 < float(table.position_embeddings.detach().std()) < 0.03


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model_type": "vitt"}, r"shape\.model_type: no encoder 'vitt'.*did you mean 'vit'"),
        ({"hiden_size": 32}, r"shape\.hiden_size: vit has no such field; did you mean 'hidden_size'"),
        ({"image_size": 30, "patch_size": 8}, "image_size 30 is no multiple of patch_size 8"),
        ({"patch_size": [8, 4]}, r"shape\.patch_size: expected one number"),
    ],
)
def test_wrong_shapes(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_trunk(shape, image_size=None)


def test_wrong_input() -> None:
    trunk, mask = small_trunk(maskable=False), torch.zeros(1, 16, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"multiples of 8×8 px, found \(1, 3, 30, 32\)"):
        trunk(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UsageError, match="no mask token; build it with maskable"):
        trunk(torch.zeros(1, 3, 32, 32), mask)
    with pytest.raises(UsageError, match=r"expected keep \(1, k\) and no mask.*found keep \(2, 3\) and no mask"):
        trunk(torch.zeros(1, 3, 32, 32), keep=torch.zeros(2, 3, dtype=torch.int64))
    decoder = {"model_type": "unclipped_llm_encoder", "patch_size": 8, "text_config": DECODER, "stem": "convolution"}
    with pytest.raises(UsageError, match="chosen patches need the stem 'linear'"):
        build_trunk(decoder, image_size=None)(torch.zeros(1, 3, 32, 32), keep=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"expected a mask \(1, 4\), found \(1, 16\)"):
        small_trunk()(torch.zeros(1, 3, 16, 16), mask)
