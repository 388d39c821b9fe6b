"""Pictures of pretraining: what is on them, when they are drawn, and that drawing changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_support import assert_equal_weights

from unclipped.core.errors import UnclippedError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.encoders.build import load_encoder
from unclipped.images.config import ImageRule
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.objectives.masked_autoencoder import FilledIn, MaskedAutoencoderObjective
from unclipped.training.config import OptimizerConfig, PretrainConfig, TrainingConfig
from unclipped.training.image_pretraining import build_autoencoder
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.pretrain import pretrain
from unclipped.training.pretraining_pictures import contact_sheet, reconstruction

SHAPES = DataConfig(sources=(SourceConfig(source="generated:shapes", limit=24),))
TRAINING = TrainingConfig(optimizer=OptimizerConfig(weight_decay=0.1), log_every_steps=2, threads=1, device="cpu")
VIT = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DINO = DinoV2Config(local_crops=2, local_size=16, prototypes=12, head_hidden=16, bottleneck=8)


def config(objective: str, **fields: Any) -> PretrainConfig:
    shape = {"image_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    given = {"steps": 4, "batch_size": 4, "data": SHAPES, "training": TRAINING, "dinov2": DINO}
    given |= {"shape": shape} if objective == "masked_autoencoder" else {"shape": VIT, "image_size": 32}
    return PretrainConfig(**({"objective": objective} | given | fields))


def drawn(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_a_sheet_has_a_picture_in_every_cell() -> None:
    red, grey = np.zeros((4, 6, 3), dtype=np.uint8), np.full((2, 3, 1), 90, dtype=np.uint8)
    red[..., 0] = 200
    sheet = np.asarray(contact_sheet([[red, grey], [grey, red]]))
    assert sheet.shape == (4 + 4 + 4 + 4 + 4, 4 + 6 + 4 + 6 + 4, 3)
    assert (sheet[4:8, 4:10] == red).all()
    assert (sheet[4:6, 14:17] == 90).all()
    assert (sheet[12:14, 4:7] == 90).all()
    assert (sheet[12:16, 14:20] == red).all()
    counted = (sheet != 255).any(axis=2).sum()
    assert counted == 2 * 24 + 2 * 6


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_perfect_autoencoder_gives_the_image_back(
    channels: int, norm_pix_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = ImageRule(
        rule="squash",
        size=(24, 24),
        patch_size=(8, 8),
        channels=channels,
        mean=(0.4,) * channels,
        std=(0.3,) * channels,
    )
    shape = {"image_size": 24, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_channels": channels}
    model = build_autoencoder(shape | {"norm_pix_loss": norm_pix_loss, "num_hidden_layers": 1})
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, channels), dtype=np.uint8)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    noise = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))

    predicted = model.forward

    def perfect(pixels: torch.Tensor, noise: torch.Tensor) -> FilledIn:
        output = predicted(pixels, noise)
        return FilledIn(predicted=model.targets(pixels, output.hidden), hidden=output.hidden)

    monkeypatch.setattr(model, "forward", perfect)
    rows = reconstruction(model, {"pixel_values": pixels, "noise": noise}, rule)
    for image, (whole, visible, filled), order in zip(images, rows, noise.argsort(dim=1), strict=True):
        assert np.array_equal(whole, image)
        assert np.array_equal(filled, image)
        shown = {int(place) for place in order[: int(9 * (1 - model.options.mask_ratio))]}
        for place in range(9):
            top, left = 8 * (place // 3), 8 * (place % 3)
            part = visible[top : top + 8, left : left + 8]
            assert (part == (image[top : top + 8, left : left + 8] if place in shown else 102)).all()


@pytest.mark.parametrize(
    ("objective", "pictures"),
    [
        ("masked_autoencoder", ["reconstruction-end", "reconstruction-start", "views"]),
        ("dinov2", ["patches-end", "patches-start", "views"]),
        ("captioning", ["patches-end", "patches-start", "views"]),
    ],
)
def test_drawing_fills_the_run_folder_and_changes_nothing(
    objective: str, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_pictures = pretrain(config(objective), tmp_path / "with")
    found = drawn(tmp_path / "with" / "pictures")
    assert list(found) == [f"00-{objective}/{name}.png" for name in pictures]
    assert not np.array_equal(*list(found.values())[:2])  # the encoder has learned
    monkeypatch.setattr("unclipped.training.stages.draw_pictures", lambda *_, **__: [])
    without = pretrain(config(objective), tmp_path / "without")
    assert not (tmp_path / "without" / "pictures").exists()
    one, other = (load_encoder(str(result.model_folder))[0] for result in (with_pictures, without))
    assert_equal_weights(one, other)


def test_a_row_of_views_for_each_image_and_a_column_of_patches(tmp_path: Path) -> None:
    pretrain(config("dinov2", steps=1), tmp_path)
    found = drawn(tmp_path / "pictures" / "00-dinov2")
    assert found["views.png"].shape == (4 + 4 * 36, 4 + 2 * 36 + 2 * 20, 3)  # 4 images; 2 crops of 32 px, 2 of 16
    patches = found["patches-start.png"]
    assert patches.shape == (4 + 2 * 36, 4 + 4 * 36, 3)
    tile = patches[40:72, 4:36].reshape(4, 8, 4, 8, 3)
    assert (tile == tile[:, :1, :, :1]).all()  # one colour a patch


def test_a_resumed_run_ends_with_the_pictures_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(config("masked_autoencoder"), tmp_path / "whole")
    seen = []

    def after_step(self: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MaskedAutoencoderObjective, "after_step", after_step)
    with pytest.raises(TrainingInterrupted, match="step 2 of 4"):
        pretrain(config("masked_autoencoder"), tmp_path / "parts")
    pretrain(config("masked_autoencoder"), tmp_path / "parts", resume=True)
    whole, parts = (drawn(tmp_path / name / "pictures") for name in ("whole", "parts"))
    assert list(whole) == list(parts)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_text_has_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"The cat {i % 7} sat on mat {i % 5}." for i in range(80)))
    source = SourceConfig(source=str(tmp_path / "text.txt"), options={"document_characters": 60})
    data = DataConfig(sources=(source,))
    fields = {"shape": {"hidden_size": 32, "intermediate_size": 64}, "image_size": None, "held_out_blocks": 2}
    pretrain(config("language_model", data=data, block_length=16, **fields), tmp_path / "run")
    assert not (tmp_path / "run" / "pictures").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("in the way")
    with pytest.raises(UnclippedError, match=r"cannot write .*pictures/00-dinov2/views\.png: .*another folder"):
        pretrain(config("dinov2"), tmp_path)
