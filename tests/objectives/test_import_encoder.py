"""Imports end to end: features, heads and image processor of the folder, what is reported, and going on to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, ViTMAEForPreTraining

from support.original_vit import Computed, Draw, OriginalVit, random_planes
from support.tiny_models import tiny_image
from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.build import load_encoder
from unclipped.encoders.importing.config import ImportConfig
from unclipped.images.patches import patchify
from unclipped.objectives.autoencoder_folder import load_autoencoder
from unclipped.objectives.dino_side import load_dino_heads
from unclipped.objectives.dinov2 import DinoV2Objective
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.objectives.import_encoder import ImportReport, import_encoder
from unclipped.objectives.masked_autoencoder import MaskedAutoencoderObjective
from unclipped.objectives.trunk import Trunk

DINO = OriginalVit(is_gated=True, chunks=2)
MAE = OriginalVit(has_layer_scale=False, has_mask_token=False)


def teacher(sizes: OriginalVit = DINO) -> dict[str, torch.Tensor]:
    named = {f"backbone.{name}": value for name, value in sizes.tensors().items()}
    for head, tensors in heads(sizes).items():
        named |= {f"{head}.{name}": value for name, value in tensors.items()}
    return named


def heads(sizes: OriginalVit = DINO) -> dict[str, dict[str, torch.Tensor]]:
    return {"dino_head": Draw(1).head(sizes.width, 20, 8, 15), "ibot_head": Draw(2).head(sizes.width, 20, 6, 11)}


def autoencoder() -> dict[str, torch.Tensor]:
    return MAE.tensors() | Draw(1).decoder(MAE, width=16, depth=2, hidden=40)


def imported(stored: Any, folder: Path, name: str = "encoder", **options: Any) -> tuple[Path, ImportReport]:
    """The folder that importing a file with this content makes."""
    torch.save(stored, folder / "weights.pth")
    config = ImportConfig(**({"checkpoint": str(folder / "weights.pth"), "attention_heads": 3} | options))
    return folder / name, import_encoder(config, folder / name)


@pytest.mark.parametrize("sizes", [DINO, OriginalVit(registers=2), MAE], ids=["dinov2", "registers", "mae"])
@torch.no_grad()
def test_the_folder_loads_here_and_in_plain_transformers_with_equal_features(
    sizes: OriginalVit, tmp_path: Path
) -> None:
    folder, report = imported(sizes.tensors(), tmp_path)
    planes = random_planes(sizes)
    expected = Computed(sizes.tensors()).features(planes.double().numpy(), 3)
    plain = AutoModel.from_pretrained(folder).eval()(planes).last_hidden_state
    np.testing.assert_allclose(plain.numpy(), expected, atol=1e-5)
    encoder, loaded = load_encoder(str(folder))
    patches = patchify(planes, (4, 4)).flatten(0, 1)
    features = encoder(patches, torch.tensor([[1, 3, 3]] * 2)).unflatten(0, (2, -1))
    assert torch.equal(features, plain[:, 1 + sizes.registers :])
    assert loaded.new == loaded.dropped == ()
    assert encoder.spec.objective == report.objective == "self_supervised"
    assert encoder.spec.image_size == (12, 12)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=tiny_image(20, 31), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 12, 12)
    assert (encoder.spec.mean, encoder.spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (encoder.spec.mean, encoder.spec.std)


@pytest.mark.parametrize("side", ["teacher", "student"])
@torch.no_grad()
def test_a_training_gives_one_side_with_its_heads(side: str, tmp_path: Path) -> None:
    other = {"teacher": "student", "student": "teacher"}[side]
    zeros = {f"{other}.{name}": 0 * value for name, value in teacher().items()}
    stored = {"model": {f"{side}.{name}": value for name, value in teacher().items()} | zeros, "iteration": 7}
    folder, report = imported(stored, tmp_path, weights=side)
    expected = Computed(DINO.tensors()).features(random_planes(DINO).double().numpy(), 3)
    found = AutoModel.from_pretrained(folder).eval()(random_planes(DINO)).last_hidden_state
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    kept, features = load_dino_heads(folder), torch.randn(5, 24)
    for name, tensors in heads().items():
        scores = kept.named_heads()[name](features)
        np.testing.assert_allclose(scores, Computed(tensors).scores(features.double().numpy()), atol=1e-5)
    assert kept.mask_token is not None
    assert torch.equal(kept.mask_token, DINO.tensors()["mask_token"][0])
    assert report.heads == {
        "dino_head": {"width": 24, "hidden": 20, "bottleneck": 8, "prototypes": 15},
        "ibot_head": {"width": 24, "hidden": 20, "bottleneck": 6, "prototypes": 11},
    }
    assert len(report.taken) == len(DINO.tensors())
    assert set(report.left_out) == {"iteration", *zeros}
    assert f"left out    {other}.backbone.cls_token, " in "\n".join(report.lines())


def test_heads_come_from_a_second_file(tmp_path: Path) -> None:
    torch.save(
        {"teacher": {name: value for name, value in teacher().items() if "head" in name}}, tmp_path / "heads.pth"
    )
    folder, _ = imported(DINO.tensors(), tmp_path, dino_heads=str(tmp_path / "heads.pth"))
    both, _ = imported({"teacher": teacher()}, tmp_path, "both")
    one, other = load_dino_heads(folder).state_dict(), load_dino_heads(both).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    torch.save(teacher(), tmp_path / "heads.pth")  # what stands beside the heads is named
    folder, report = imported(DINO.tensors(), tmp_path, dino_heads=str(tmp_path / "heads.pth"))
    assert report.left_out["heads.pth: norm.bias"] == "only the heads of this file are taken"


def test_a_head_of_another_kind_is_named_and_left_out(tmp_path: Path) -> None:
    stored = teacher() | {"ibot_head.mlp.6.weight": torch.zeros(6, 6), "ibot_head.mlp.6.bias": torch.zeros(6)}
    folder, report = imported(stored, tmp_path)
    assert load_dino_heads(folder).named_heads().keys() == {"dino_head"}
    reasons = {reason for name, reason in report.left_out.items() if name.startswith("ibot_head.")}
    assert reasons == {"a head of layers 0, 2, 4, 6; heads here have three, without batch norms"}


def test_dinov2_training_goes_on_from_an_import(tmp_path: Path) -> None:
    folder, _ = imported({"teacher": teacher()}, tmp_path)
    encoder, _ = load_encoder(str(folder))
    kept = load_dino_heads(folder)
    options = DinoV2Config(head_hidden=20, bottleneck=8, prototypes=15, local_crops=1, local_size=8)
    objective = DinoV2Objective(Trunk(encoder, maskable=True), options, steps=2)
    assert kept.dino_head is not None
    for side in (objective.student, objective.teacher):
        side.dino_head.load_state_dict(kept.dino_head.state_dict())
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:2, :3] = True
    output = objective(global_crops=random_planes(DINO, 4), local_crops=torch.randn(2, 3, 8, 8), mask=mask)
    output["loss"].backward()
    assert torch.isfinite(output["loss"])


def test_every_tensor_is_accounted_for_in_the_record(tmp_path: Path) -> None:
    stored = {"model": autoencoder() | {"head.weight": torch.zeros(2, 24)}, "epoch": 3}
    folder, report = imported(stored, tmp_path, objective="self_supervised")
    record = json.loads((folder / "import.json").read_text())
    assert sorted([*record["taken"], *record["left_out"]]) == sorted([*stored["model"], "epoch"])
    assert record["options"]["attention_heads"] == 3
    assert record["versions"].keys() == {"unclipped", "transformers"}
    lines = "\n".join(report.lines())
    assert "encoder     vit, " in lines
    assert "width 24, 2 blocks, 3 attention heads, patch 4 px, images 12 px" in lines
    assert "head.weight: a classifier" in lines


def test_given_statistics_and_objective_are_written(tmp_path: Path) -> None:
    folder, report = imported(
        MAE.tensors(), tmp_path, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), objective="supervised"
    )
    encoder, _ = load_encoder(str(folder))
    assert (encoder.spec.mean, encoder.spec.objective) == ((0.1, 0.2, 0.3), "supervised")
    assert report.statistics_from == "given"
    grey = OriginalVit(channels=1)
    with pytest.raises(UsageError, match=r"takes images of 1 channels.*give --mean and --std"):
        imported(grey.tensors(), tmp_path)
    with pytest.raises(UsageError, match="mean needs 1 numbers"):
        imported(grey.tensors(), tmp_path, mean=(0.1, 0.2), std=(0.1, 0.2))
    with pytest.raises(UsageError, match="takes images of 4 channels; images here have one or three"):
        imported(OriginalVit(channels=4).tensors(), tmp_path, mean=(0.1,) * 4, std=(0.1,) * 4)
    folder, _ = imported(grey.tensors(), tmp_path, "grey", mean=(0.5,), std=(0.2,))
    assert load_encoder(str(folder))[0].spec.channels == 1


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing 1: norm\.bias"):
        imported({name: value for name, value in DINO.tensors().items() if name != "norm.bias"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    ("stored", "message"),
    [(DINO.tensors(), "holds no DINO heads"), ({"teacher": DINO.tensors()}, "holds no DINO heads")],
)
def test_a_file_without_heads_is_no_second_file(stored: Any, message: str, tmp_path: Path) -> None:
    torch.save(stored, tmp_path / "second.pth")
    with pytest.raises(CheckpointError, match=message):
        imported(DINO.tensors(), tmp_path, dino_heads=str(tmp_path / "second.pth"))
    with pytest.raises(UsageError, match="holds heads itself; leave --dino-heads out"):
        imported(teacher(), tmp_path, dino_heads=str(tmp_path / "second.pth"))


# ---- masked autoencoders


@torch.no_grad()
def test_a_masked_autoencoder_goes_on_where_it_stood(tmp_path: Path) -> None:
    folder, report = imported({"model": autoencoder()}, tmp_path, decoder=True, decoder_heads=2)
    assert report.left_out == {}
    planes, noise = random_planes(MAE), torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    keep = noise.argsort(dim=1)[:, :2].numpy()
    expected = Computed(autoencoder()).reconstruction(planes.double().numpy(), keep, 3, 2)
    model = load_autoencoder(folder)
    filled = model(planes, noise)
    for image, places in enumerate(filled.hidden.numpy()):
        theirs = expected[image, places].reshape(-1, 4, 4, 3).transpose(0, 3, 1, 2).reshape(-1, 48)
        np.testing.assert_allclose(filled.predicted[image].numpy(), theirs, atol=1e-5)
    loss = MaskedAutoencoderObjective(model)(pixel_values=planes, noise=noise)["loss"]
    plain = ViTMAEForPreTraining.from_pretrained(folder)(planes, noise=noise)
    torch.testing.assert_close(loss, plain.loss, atol=1e-5, rtol=0)
    encoder, loaded = load_encoder(str(folder))  # as an encoder it has no decoder
    assert encoder.spec.family == "vit_mae"
    assert all(name.startswith("decoder.") for name in loaded.dropped)


def test_a_masked_autoencoder_needs_its_decoder_and_its_fixed_positions(tmp_path: Path) -> None:
    folder, _ = imported(MAE.tensors(), tmp_path)
    with pytest.raises(CheckpointError, match="expected a vit_mae with its decoder, found a vit"):
        load_autoencoder(folder)
    moved = autoencoder()
    moved["decoder_pos_embed"] = moved["decoder_pos_embed"] + 0.01
    folder, _ = imported(moved, tmp_path, decoder=True, decoder_heads=2)
    with pytest.raises(CheckpointError, match="positions that are not the fixed sines and cosines"):
        load_autoencoder(folder)
    encoder, _ = load_encoder(str(folder))
    encoder.model.save_pretrained(tmp_path / "encoder-alone")
    with pytest.raises(CheckpointError, match=r"missing .*decoder.*unclipped import-encoder --decoder"):
        load_autoencoder(tmp_path / "encoder-alone")
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_autoencoder(folder)


def test_raw_pixels_are_said(tmp_path: Path) -> None:
    options = {"decoder": True, "decoder_heads": 2, "normalised_pixels": False}
    folder, _ = imported(autoencoder(), tmp_path, **options)
    assert not load_autoencoder(folder).options.normalise_pixels
