"""Encoders under original names: features against NumPy float64, every tensor accounted for, and what does not fit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel, AutoModelForPreTraining

from support.original_vit import Computed, Draw, OriginalVit, random_planes
from unclipped.core.errors import CheckpointError, UnclippedError, UsageError
from unclipped.encoders.importing.config import ImportConfig
from unclipped.encoders.importing.files import OriginalWeights
from unclipped.encoders.importing.keys import ImportedEncoder, convert
from unclipped.encoders.vit_shapes import SHAPES, heads_of_width

PATH = Path("weights.pth")
PLAIN = OriginalVit(has_layer_scale=False, has_mask_token=False)


def imported(tensors: dict[str, Tensor], **options: Any) -> ImportedEncoder:
    given = {"checkpoint": str(PATH), "attention_heads": 3} | options
    return convert(OriginalWeights(PATH, encoder=dict(tensors)), ImportConfig(**given))


def model_of(found: ImportedEncoder) -> Any:
    """What transformers makes of the folder, in evaluation mode."""
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder))
        is_whole = found.config.model_type == "vit_mae"
        options = {"add_pooling_layer": False} if found.config.model_type == "vit" else {}
        model, info = (AutoModelForPreTraining if is_whole else AutoModel).from_pretrained(
            folder, output_loading_info=True, dtype="auto", **options
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


SIZES = st.builds(
    OriginalVit,
    width=st.sampled_from([12, 24]),
    depth=st.integers(1, 3),
    heads=st.sampled_from([1, 3]),
    patch=st.integers(2, 5),
    rows=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    ratio=st.sampled_from([2, 4]),
    is_gated=st.booleans(),
    registers=st.sampled_from([0, 1, 4]),
    has_layer_scale=st.booleans(),
    has_qkv_bias=st.booleans(),
    has_mask_token=st.booleans(),
    chunks=st.sampled_from([0, 1, 2]),
)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
@torch.no_grad()
def test_features_are_those_of_the_original(sizes: OriginalVit, seed: int) -> None:
    tensors, planes = sizes.tensors(seed), random_planes(sizes)
    found = imported(tensors, attention_heads=sizes.heads)
    expected = Computed(tensors).features(planes.double().numpy(), sizes.heads)
    features = model_of(found).double()(planes.double()).last_hidden_state
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6, rtol=1e-6)  # positions were stored in float32
    is_vit = not (sizes.registers or sizes.has_layer_scale or sizes.is_gated)
    family = "vit" if is_vit else "dinov2_with_registers" if sizes.registers else "dinov2"
    assert found.config.model_type == found.shape.family == family
    assert len(found.taken) + len(found.left_out) == len(tensors)
    assert set(found.left_out) == ({"mask_token"} & tensors.keys() if is_vit else set())
    assert found.shape.side == sizes.side


@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_masked_patches_become_the_originals_mask_token(registers: int) -> None:
    sizes = OriginalVit(registers=registers)
    tensors, planes = sizes.tensors(), random_planes(sizes)
    mask = np.random.default_rng(0).random((2, 9)) < 0.5
    expected = Computed(tensors).features(planes.double().numpy(), 3, mask)
    model = model_of(imported(tensors)).double()
    features = model(planes.double(), bool_masked_pos=torch.from_numpy(mask)).last_hidden_state
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_decoder_is_kept_when_asked_for() -> None:
    tensors = PLAIN.tensors() | Draw(1).decoder(PLAIN, width=16, depth=2, hidden=40)
    planes = random_planes(PLAIN)
    noise = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    keep = noise.argsort(dim=1)[:, :2].numpy()  # a quarter of nine
    found = imported(tensors, decoder=True, decoder_heads=2)
    model = model_of(found).double()
    logits = model(planes.double(), noise=noise).logits
    expected = Computed(tensors).reconstruction(planes.double().numpy(), keep, 3, 2)
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-6, rtol=1e-6)
    assert sorted(found.taken) == sorted(tensors)
    assert (model.config.mask_ratio, model.config.norm_pix_loss) == (0.75, True)
    without = imported(tensors)
    assert without.config.model_type == "vit"
    assert set(without.left_out) == tensors.keys() - PLAIN.tensors().keys()
    assert set(without.left_out.values()) == {"the masked autoencoder's decoder; --decoder keeps it"}


def test_what_the_architecture_has_not_is_filled_neutrally_and_said() -> None:
    sizes = OriginalVit(has_layer_scale=False, has_mask_token=False, registers=1)
    found = imported(sizes.tensors())
    assert set(found.new) == {"embeddings.mask_token"} | {
        f"encoder.layer.{block}.layer_scale{index}.lambda1" for block in (0, 1) for index in (1, 2)
    }
    assert all(bool((found.tensors[name] == (0 if "mask" in name else 1)).all()) for name in found.new)


def test_a_dtype_is_kept_and_several_become_float32() -> None:
    tensors = {name: value.bfloat16() for name, value in OriginalVit().tensors().items()}
    assert {value.dtype for value in model_of(imported(tensors)).state_dict().values()} == {torch.bfloat16}
    tensors["norm.weight"] = tensors["norm.weight"].float()
    assert {value.dtype for value in model_of(imported(tensors)).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("web")])
def test_published_sizes_are_recognised_whole(name: str) -> None:
    fields = SHAPES[name]
    is_dino = fields["model_type"] == "dinov2"
    sizes = OriginalVit(
        width=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        patch=fields["patch_size"],
        rows=fields["image_size"] // fields["patch_size"],
        is_gated=is_dino,
        has_layer_scale=is_dino,
        has_mask_token=is_dino,
        chunks=4 if is_dino else 0,  # as these were trained
    )
    tensors = sizes.tensors(seed=None)  # no memory is taken
    found = imported(tensors, attention_heads=None)
    model_type, expected = fields["model_type"], {key: fields[key] for key in fields if key != "model_type"}
    assert found.shape.config_fields().items() >= expected.items()
    assert found.config.model_type == model_type
    options = {"add_pooling_layer": False} if model_type == "vit" else {}
    with torch.device("meta"):
        model = AutoModel.from_config(found.config, **options)
    assert sum(value.numel() for value in model.parameters()) == sum(value.numel() for value in found.tensors.values())
    assert found.config.num_hidden_layers == fields["num_hidden_layers"]


def test_heads_of_published_widths() -> None:
    assert [heads_of_width(width) for width in (384, 768, 1024, 1280, 1536, 2688, 4096)] == [6, 12, 16, 16, 24, 21, 32]
    assert heads_of_width(100) is None


# ---- what does not fit


def without(*names: str) -> dict[str, Tensor]:
    return {name: value for name, value in OriginalVit().tensors().items() if name not in names}


def changed(**values: Tensor) -> dict[str, Tensor]:
    return OriginalVit().tensors() | values


def test_all_misfits_are_listed_at_once() -> None:
    tensors = without("blocks.1.norm1.weight") | {"norm.bias": torch.zeros(5), "surplus": torch.zeros(2)}
    tensors["blocks.0.attn.qkv.weight"] = torch.zeros(72, 24, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        imported(tensors)
    for part in (
        "weights.pth",
        "missing 1: blocks.1.norm1.weight",
        "unexpected 1: surplus",
        "misshaped 2: blocks.0.attn.qkv.weight (found torch.int64, expected floating point), norm.bias (found (5,)",
        "--leave-out NAME",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_tensors_are_left_out_by_pattern() -> None:
    tensors = changed(extra_a=torch.zeros(1), extra_b=torch.zeros(1))
    found = imported(tensors, leave_out=("extra_*",))
    assert found.left_out == {"extra_a": "as asked for", "extra_b": "as asked for"}
    with pytest.raises(CheckpointError, match=r"missing 1: norm\.bias"):
        imported(tensors, leave_out=("extra_*", "norm.bias"))


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (without("patch_embed.proj.weight"), {}, CheckpointError, r"no vision transformer under original names.*found"),
        ({}, {}, CheckpointError, "found nothing"),
        (changed(pos_embed=torch.zeros(1, 9, 24)), {}, CheckpointError, r"pos_embed: expected \(1, 1 \+ rows², 24\)"),
        (changed(pos_embed=torch.zeros(10, 24)), {}, CheckpointError, r"pos_embed.*found \(10, 24\)"),
        (
            changed(**{"patch_embed.proj.weight": torch.zeros(24, 3, 4, 2)}),
            {},
            CheckpointError,
            r"expected \(width, channels, patch, patch\), found \(24, 3, 4, 2\)",
        ),
        (without("blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc2.weight"), {}, CheckpointError, "no feed-forward weights"),
        (OriginalVit(chunks=1).tensors() | OriginalVit().tensors(), {}, CheckpointError, "blocks counted twice"),
        (changed(), {"attention_heads": 5}, UsageError, "--attention-heads 5: does not divide the width 24"),
        (changed(), {"attention_heads": None}, UsageError, r"no published shape has the width 24; give --attention-h"),
        (changed(), {"decoder": True}, UsageError, "holds no decoder of a masked autoencoder; leave --decoder out"),
        (
            PLAIN.tensors() | Draw(1).decoder(PLAIN, 16, 1, 40),
            {"decoder": True},
            UsageError,
            "no published shape has the width 16; give --decoder-heads",
        ),
        (
            PLAIN.tensors() | {"decoder_embed.weight": torch.zeros(16, 24)},
            {"decoder": True},
            CheckpointError,
            "the decoder lacks",
        ),
        (changed(**{"head.weight": torch.zeros(9, 24)}), {}, UsageError, "holds a classifier.*--objective supervised"),
        (OriginalVit(ratio=4).tensors() | {
            f"blocks.{n}.mlp.{k}": torch.zeros(*s)
            for n in (0, 1) for k, s in (("fc1.weight", (50, 24)), ("fc1.bias", (50,)), ("fc2.weight", (24, 50)))
        }, {}, CheckpointError, r"weights\.pth: a feed-forward of width 50 .* no whole mlp_ratio"),
    ],
)  # fmt: skip
def test_wrong_files_and_options(
    tensors: dict[str, Tensor], options: dict[str, Any], error: type[UnclippedError], message: str
) -> None:
    with pytest.raises(error, match=message) as found:
        imported(tensors, **options)
    assert "weights.pth" in str(found.value)


@pytest.mark.parametrize("objective", ["supervised", "self_supervised"])
def test_a_classifier_is_left_out_once_the_objective_is_said(objective: str) -> None:
    tensors = PLAIN.tensors() | {"head.weight": torch.zeros(9, 24), "head.bias": torch.zeros(9)}
    found = imported(tensors, objective=objective)
    assert found.objective == found.config.unclipped_objective == objective
    assert found.left_out == {"head.weight": "a classifier", "head.bias": "a classifier"}
