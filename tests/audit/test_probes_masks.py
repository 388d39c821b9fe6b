"""Folders of masks in the usual layouts, that of ADE20k among them, and its figure against an independent count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from support.tiny_models import tiny_encoder, tiny_image
from unclipped.audit.config import EncoderEvaluationConfig, SegmentationConfig
from unclipped.audit.masks import ADE20K_CLASSES, VOID, load_segmented, masks_at
from unclipped.audit.runner import evaluate_encoder
from unclipped.audit.segmentation import LinearSegmenter, iou_estimate, measure_overlaps
from unclipped.core.errors import DataError

VALUES = (0, 1, 2, 150)
SHAPE = (24, 32)


def save(folder: Path, images: str, masks: str, name: str, values: np.ndarray) -> None:
    for inner in (images, masks):
        (folder / inner / name).parent.mkdir(parents=True, exist_ok=True)
    tiny_image(*values.shape, offset=sum(name.encode()) % 200).save(folder / images / f"{name}.jpg")
    Image.fromarray(values.astype(np.uint8)).save(folder / masks / f"{name}.png")


def ade20k(folder: Path, counts: tuple[int, int] = (6, 4)) -> Path:
    """ADEChallengeData2016 with a few images: quarters of class values 0 (void), 1, 2 and 150."""
    generator = np.random.default_rng(0)
    for split, count in zip(("training", "validation"), counts, strict=True):
        for number in range(count):
            blocks = generator.choice(VALUES, size=(2, 2))
            values = np.kron(blocks, np.ones((SHAPE[0] // 2, SHAPE[1] // 2), dtype=int))
            save(folder, f"images/{split}", f"annotations/{split}", f"ADE_{split[:5]}_{number:08d}", values)
    return folder


def names_file(folder: Path) -> None:
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{number}\t0.1\t10\t1\t0\tthing {number}, other name" for number in range(1, ADE20K_CLASSES + 1)]
    (folder / "objectInfo150.txt").write_text("\n".join(lines) + "\n")


def test_ade20k_is_found_by_its_folders(tmp_path: Path) -> None:
    data = load_segmented(SegmentationConfig(source=str(ade20k(tmp_path))))
    assert (len(data.train), len(data.test), len(data.classes)) == (6, 4, 150)
    assert data.classes[0] == "class 1"
    assert data.test[0].id == "ADE_valid_00000000.jpg"
    for item in (*data.train, *data.test):
        split = "training" if item in data.train else "validation"
        stored = np.array(Image.open(tmp_path / "annotations" / split / item.id.replace(".jpg", ".png"))).astype(int)
        np.testing.assert_array_equal(item.mask(), np.where(stored == 0, VOID, stored - 1))
    assert masks_at(data.train, (8, 8)).shape == (6, 8, 8)


def test_ade20k_brings_its_names(tmp_path: Path) -> None:
    names_file(ade20k(tmp_path))
    data = load_segmented(SegmentationConfig(source=str(tmp_path), layout="ade20k", train_limit=2))
    assert (data.classes[0], data.classes[149], len(data.train)) == ("thing 1", "thing 150", 2)
    named = tuple(str(number) for number in range(150))
    assert load_segmented(SegmentationConfig(source=str(tmp_path), layout="ade20k", classes=named)).classes == named
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    with pytest.raises(DataError, match=r"objectInfo150\.txt: expected a number from 1 to 150 .* found 1 of them"):
        load_segmented(SegmentationConfig(source=str(tmp_path)))


@pytest.mark.parametrize("kind", ["masks", "annotations"])
def test_kind_folders_with_inner_folders(kind: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path, f"images/{split}", f"{kind}/{split}", "ulm/one", np.array([[5, 6], [255, 5]]))
        save(tmp_path, f"images/{split}", f"{kind}/{split}", "aachen/two", np.array([[6]]))
    config = SegmentationConfig(source=str(tmp_path), classes=("sky", "road"), first_class=5, test_split="val")
    data = load_segmented(config)
    assert [item.id for item in data.test] == ["aachen/two.jpg", "ulm/one.jpg"]
    np.testing.assert_array_equal(data.test[1].mask(), [[0, 1], [VOID, 0]])


def test_an_ignored_class_is_void_wherever_its_number_lies(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path, f"{split}/images", f"{split}/masks", "one", np.array([[0, 1, 2]]))
    config = SegmentationConfig(source=str(tmp_path), classes=("a", "b", "c"), ignore=1)
    np.testing.assert_array_equal(load_segmented(config).test[0].mask(), [[0, VOID, 2]])
    shapes = SegmentationConfig(train_limit=2, test_limit=2, ignore=0)
    assert 0 not in load_segmented(shapes).test[0].mask(), "background of generated scenes can be left out too"


def independent_iou(predicted: list[np.ndarray], stored: list[np.ndarray]) -> float:
    """From file values, class by class over all images, by sets of pixels."""
    ratios = []
    for value in range(1, 151):
        shared = whole = 0
        for found, mask in zip(predicted, stored, strict=True):
            ours = {tuple(place) for place in np.argwhere((found + 1 == value) & (mask != 0))}
            theirs = {tuple(place) for place in np.argwhere(mask == value)}
            shared, whole = shared + len(ours & theirs), whole + len(ours | theirs)
        ratios += [shared / whole] if whole else []
    return sum(ratios) / len(ratios)


def enlarged(scores: np.ndarray) -> np.ndarray:
    """(2, 2, C) → (24, 32, C) by the formula of bilinear interpolation between pixel centres."""
    weights = [np.clip(2 * (np.arange(side) + 0.5) / side - 0.5, 0, 1) for side in SHAPE]
    rows, columns = (np.stack([1 - weight, weight], axis=1) for weight in weights)
    return np.einsum("ya,xb,abc->yxc", rows, columns, scores)


def test_mean_iou_with_void_pixels_equals_an_independent_count(tmp_path: Path) -> None:
    data = load_segmented(SegmentationConfig(source=str(ade20k(tmp_path))))
    scores = np.full((4, 4, 150), -10.0)
    scores[:, :, [0, 1, 2, 149]] = np.random.default_rng(1).normal(size=(4, 4, 4))
    head = LinearSegmenter(150, 150).eval()  # its normalisation has seen nothing and changes nothing but by 1e-5
    with torch.no_grad():
        head.classify.weight.copy_(torch.eye(150)[:, :, None, None])
    rows = measure_overlaps(head, torch.tensor(scores, dtype=torch.float32), data.test, (2, 2), 150)
    predicted = [enlarged(row.reshape(2, 2, 150)).argmax(axis=-1) for row in scores]
    names = [item.id.replace(".jpg", ".png") for item in data.test]
    stored = [np.array(Image.open(tmp_path / "annotations" / "validation" / name)).astype(int) for name in names]
    assert any((mask == 0).any() for mask in stored)
    found = iou_estimate(rows, samples=100, confidence=0.95, seed=0)
    assert found.value == pytest.approx(independent_iou(predicted, stored), abs=1e-12)


def config_of(vision: str, source: Path, **changes: Any) -> EncoderEvaluationConfig:
    segmentation = {"source": str(source), "steps": 3, "batch_size": 2} | changes
    return EncoderEvaluationConfig(encoder=vision, segmentation=segmentation, bootstrap_samples=100, device="cpu")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_encoder(tmp_path_factory.mktemp("models") / "vision"))


def test_a_whole_evaluation_on_ade20k(vision: str, tmp_path: Path) -> None:
    results = evaluate_encoder(
        config_of(vision, ade20k(tmp_path / "data")), tmp_path / "out", console=Console(quiet=True)
    )
    assert results.differences["segmentation"].keys() == {"random_weights", "raw_pixels"}
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["data"]["segmentation"]["train"] == 6
    occurring = {"class 1", "class 2", "class 150"}
    for arm in ("encoder", "random_weights", "raw_pixels"):
        assert occurring <= found["probes"]["segmentation"][arm]["classes"].keys()
    report = (tmp_path / "out" / "report.md").read_text()
    assert "150 classes" in report
    assert "| class | the encoder | random weights | raw pixels |" in report
    assert "| class 150 | 0." in report


def without_a_mask(folder: Path) -> None:
    (folder / "annotations" / "validation" / "ADE_valid_00000002.png").unlink()


def of_another_size(folder: Path) -> None:
    Image.new("L", (5, 4), 1).save(folder / "annotations" / "validation" / "ADE_valid_00000001.png")


def of_a_class_too_many(folder: Path) -> None:
    values = np.full(SHAPE, 151, dtype=np.uint8)
    Image.fromarray(values).save(folder / "annotations" / "training" / "ADE_train_00000003.png")


def cut(folder: Path) -> None:
    path = folder / "annotations" / "training" / "ADE_train_00000000.png"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_mask, r"validation/ADE_valid_00000002\.jpg: no mask .*; add it or remove the image"),
        (of_another_size, r"00000001\.png: 4x5 px, but its image .*00000001\.jpg has 24x32 \(height x width\)"),
        (of_a_class_too_many, r"ADE_train_00000003\.png: value 151 is no class \(1 to 150\) and not ignore \(0\)"),
        (cut, r"mask .*ADE_train_00000000\.png: not an image of a known format, or cut off"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_encoder_works(
    vision: str, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    change(ade20k(tmp_path / "data"))
    with pytest.raises(DataError, match=message):
        evaluate_encoder(config_of(vision, tmp_path / "data"), tmp_path / "out", console=Console(quiet=True))
    assert not (tmp_path / "out" / "features").exists()


def test_a_split_without_masks(tmp_path: Path) -> None:
    (ade20k(tmp_path) / "annotations" / "validation").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"expected the folder .*annotations/validation in layout ade20k"):
        load_segmented(SegmentationConfig(source=str(tmp_path)))
