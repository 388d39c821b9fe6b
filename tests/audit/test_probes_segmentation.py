"""Mean intersection over union against a naive loop; masks of scenes and of files; the head learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.tiny_models import tiny_image
from unclipped.audit.config import SegmentationConfig
from unclipped.audit.masks import load_segmented, masks_at
from unclipped.audit.segmentation import (
    Overlaps,
    confusion,
    iou_difference,
    iou_estimate,
    mean_iou,
    measure_overlaps,
    overlaps_of,
    train_segmenter,
)
from unclipped.core.errors import DataError, UsageError
from unclipped.data.generated.masks import object_masks
from unclipped.data.generated.registry import open_generated

INTERVALS = {"samples": 200, "confidence": 0.95, "seed": 0}


def drawn(images: int = 6, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes and masks (N, 5, 7); class 3 only in masks of some images, 255 ignored."""
    generator = np.random.default_rng(0)
    predicted = generator.integers(0, classes - 1, size=(images, 5, 7))
    masks = generator.integers(0, classes, size=(images, 5, 7)).astype(np.uint8)
    masks[generator.random(masks.shape) < 0.2] = 255
    return predicted, masks


def naive(predicted: np.ndarray, masks: np.ndarray, classes: int) -> float:
    ratios = []
    for number in range(classes):
        shared = whole = 0
        for found, wanted in zip(predicted.ravel(), masks.ravel(), strict=True):
            if wanted == 255:
                continue
            shared += found == number and wanted == number
            whole += found == number or wanted == number
        if whole:
            ratios.append(shared / whole)
    return sum(ratios) / len(ratios)


def overlaps(predicted: np.ndarray, masks: np.ndarray, classes: int) -> Overlaps:
    pairs = zip(predicted, masks, strict=True)
    return overlaps_of(np.stack([confusion(found, mask, classes, 255) for found, mask in pairs]))


@pytest.mark.parametrize("classes", [4, 6])
def test_mean_iou_equals_the_naive_loop(classes: int) -> None:
    predicted, masks = drawn()
    estimate = iou_estimate(overlaps(predicted, masks, classes), **INTERVALS)
    assert estimate.value == pytest.approx(naive(predicted, masks, classes))
    assert estimate.low < estimate.value < estimate.high
    assert (estimate.count, estimate.method) == (6, "bootstrap")


def test_it_is_the_figure_of_the_data_set_and_not_a_mean_over_images() -> None:
    masks = np.zeros((2, 1, 4), dtype=np.uint8)
    masks[0] = 1
    predicted = np.array([[[1, 1, 1, 1]], [[0, 0, 0, 1]]])
    rows = overlaps(predicted, masks, 2)
    assert mean_iou(rows.intersection.sum(0), rows.union.sum(0)) == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert mean_iou(rows.intersection, rows.union).mean() == pytest.approx((1 + (3 / 4 + 0) / 2) / 2)


def test_paired_difference() -> None:
    predicted, masks = drawn()
    one, two = overlaps(np.minimum(masks, 2), masks, 4), overlaps(predicted, masks, 4)
    difference = iou_difference(one, two, **INTERVALS)
    parts = [iou_estimate(rows, **INTERVALS).value for rows in (one, two)]
    assert difference.value == pytest.approx(parts[0] - parts[1])
    assert difference.excludes_zero
    same = iou_difference(one, one, **INTERVALS)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(DataError, match="the same images"):
        iou_difference(one, overlaps(predicted[:3], masks[:3], 4), **INTERVALS)


def test_masks_of_scenes_lie_on_the_shapes() -> None:
    source = open_generated("shapes", "train", {"noise": 0, "tasks": {"count": 1}})
    data = load_segmented(SegmentationConfig(train_limit=5, test_limit=1))
    assert data.classes == ("background", "circle", "square", "triangle")
    for index in range(5):
        sample = source[index]
        assert sample.id == data.train[index].id
        mask = data.train[index].mask()
        pixels = np.asarray(sample.images[0].source).astype(int)
        background = np.array(sample.metadata["scene"]["background"])
        assert mask.shape == pixels.shape[:2]
        # Half-covered edge pixels aside, a pixel is of a shape exactly where the picture differs from its background.
        differs = np.abs(pixels - background).sum(axis=-1)
        strongest = max(
            np.abs(np.array(item["rgb"]) - background).sum() for item in sample.metadata["scene"]["objects"]
        )
        assert (differs[mask > 0] > 0).all()
        assert (differs[mask == 0] <= 0.51 * strongest).all()
        kinds = {item["kind"] for item in sample.metadata["scene"]["objects"]}
        assert set(np.unique(mask)) - {0} == {("circle", "square", "triangle").index(kind) + 1 for kind in kinds}


def test_captioned_scenes_bring_masks_of_all_their_kinds() -> None:
    options = {"scenes": {"shapes": 1, "charts": 1}, "size": [96, 176]}
    data = load_segmented(SegmentationConfig(source="generated:captions", train_limit=8, test_limit=2, options=options))
    assert data.classes[:5] == ("background", "circle", "square", "triangle", "text")
    assert len(data.classes) == 11
    source = open_generated("captions", "train", options)
    seen = set()
    for index, item in enumerate(data.train):
        masks, mask = object_masks(source[index]), item.mask()
        for number, thing in enumerate(source[index].metadata["scene"]["objects"]):
            assert (mask[masks[number]] == data.classes.index(thing["kind"])).all()
            seen.add(thing["kind"])
        assert ((mask > 0) == masks.any(axis=0)).all()
    assert {"circle", "text"} <= seen


def test_the_head_learns_what_patches_say() -> None:
    data = load_segmented(
        SegmentationConfig(
            train_limit=24, test_limit=8, options={"size": [32, 32], "count": [1, 1], "shape_size": [8, 16]}
        )
    )
    grid, patch = (16, 16), 2

    def patches(items: tuple) -> torch.Tensor:
        """The share of each class in a patch, among dimensions that say nothing: (N, n, 7)."""
        rows = []
        for item in items:
            one_hot = np.eye(4)[item.mask()].reshape(grid[0], patch, grid[1], patch, 4).mean(axis=(1, 3))
            rows.append(torch.tensor(one_hot.reshape(-1, 4), dtype=torch.float32))
        shares = torch.stack(rows)
        return torch.cat([shares, torch.randn(*shares.shape[:2], 3)], dim=-1)

    config = SegmentationConfig(steps=120, batch_size=8, learning_rate=0.05)
    head = train_segmenter(patches(data.train), masks_at(data.train, (32, 32)), grid, 4, config)
    rows = measure_overlaps(head, patches(data.test), data.test, grid, 4)
    assert iou_estimate(rows, **INTERVALS).value > 0.75


def folder_of_masks(folder: Path, mask: np.ndarray | Image.Image | None) -> SegmentationConfig:
    for split in ("train", "test"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "masks").mkdir()
        size = (16, 16) if mask is None else mask.shape if isinstance(mask, np.ndarray) else mask.size
        tiny_image(*size).save(folder / split / "images" / "one.png")
        if mask is not None:
            image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
            image.save(folder / split / "masks" / "one.png")
    return SegmentationConfig(source=str(folder), classes=("sky", "road"))


def test_masks_in_files(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [255, 1]], dtype=np.uint8)
    data = load_segmented(folder_of_masks(tmp_path, mask))
    np.testing.assert_array_equal(data.test[0].mask(), mask)
    assert (data.classes, data.train[0].id) == (("sky", "road"), "one.png")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "no mask .*one.png; add it"),
        (np.full((2, 2), 7, dtype=np.uint8), r"value 7 is no class \(0 to 1\) and not ignore \(255\)"),
        (Image.new("RGB", (2, 2)), r"mode RGB; expected one byte a pixel"),
    ],
)
def test_wrong_masks(tmp_path: Path, mask: np.ndarray | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_segmented(folder_of_masks(tmp_path, mask)).train[0].mask()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "generated:majority"}, "generated:majority draws no image here, so it has no masks"),
        ({"source": "generated:captions", "options": {"as_text": True}}, "draws no image here"),
        ({"source": "generated:captions", "classes": ("a", "b")}, "generated:captions brings its own"),
        ({"source": "generated:shapes", "classes": ("a", "b")}, "brings its own"),
        ({"source": "generated:shapes", "layout": "ade20k"}, "generated:shapes takes neither"),
        ({"source": "somewhere"}, "no such folder; check segmentation.source"),
        ({"source": "."}, r"expected <split>/images .* \(ade20k\) for the split 'train', found nothing; check source"),
        ({"source": ".", "layout": "split_folders", "classes": ("a", "b")}, "train/images in layout split_folders"),
        ({"source": ".", "layout": "kind_folders", "classes": ("a", "b")}, "images/train in layout kind_folders"),
        ({"source": ".", "layout": "kind_folders"}, "name the classes"),
        ({"source": ".", "layout": "ade20k", "classes": ("a", "b")}, "has 150 classes, found 2 names"),
        ({"source": ".", "layout": "ade20k", "ignore": 7}, "segmentation.ignore: layout ade20k fixes it"),
        ({"source": ".", "layout": "ade20k", "first_class": 2}, "segmentation.first_class: layout ade20k fixes it"),
    ],
)
def test_wrong_sources(config: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, DataError), match=message):
        load_segmented(SegmentationConfig(**config))


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    data = load_segmented(folder_of_masks(tmp_path, np.full((16, 16), 255, dtype=np.uint8)))
    with pytest.raises(DataError, match="every pixel of the training masks is to be ignored"):
        train_segmenter(torch.randn(1, 4, 3), masks_at(data.train, (16, 16)), (2, 2), 2, SegmentationConfig())
