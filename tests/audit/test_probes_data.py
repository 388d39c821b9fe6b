"""Labels from class folders, tables and generated scenes; where a label cannot be had, one clear error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from support.tiny_models import tiny_encoder, tiny_image
from unclipped.audit.config import EncoderEvaluationConfig, LabelledDataConfig
from unclipped.audit.data import COLUMNS, ROWS, load_labelled
from unclipped.audit.runner import evaluate_encoder
from unclipped.core.errors import DataError, UsageError
from unclipped.images.decode import load_image


def labelled(**fields: Any) -> Any:
    return load_labelled(LabelledDataConfig(**fields))


# -- class folders ----------------------------------------------------------------------------------------------------


def imagenet(folder: Path) -> Path:
    """train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, beside the lists that come with them."""
    for split, count in (("train", 4), ("val", 2)):
        for wnid in ("n01440764", "n02102040", "n03000684"):
            (folder / split / wnid).mkdir(parents=True)
            for number in range(count):
                path = folder / split / wnid / f"{wnid}_{number}.JPEG"
                tiny_image(16, 20, offset=(sum(wnid.encode()) + 7 * number + count) % 200).save(path)
    (folder / "imagenet_class_index.json").write_text("{}")
    (folder / "train" / ".hidden.JPEG").write_text("no image")
    return folder


def test_imagenet(tmp_path: Path) -> None:
    data = labelled(source=str(imagenet(tmp_path)), test_split="val")
    assert data.classes == ("n01440764", "n02102040", "n03000684")
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.test[0].id == "n01440764/n01440764_0.JPEG"
    assert [item.label for item in data.test] == [0, 0, 1, 1, 2, 2]
    assert load_image(data.test[5].image.source).size == (20, 16)


def test_a_label_that_is_not_of_class_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.label: position does not fit .* labelled by their folder; leave it"):
        labelled(source=str(imagenet(tmp_path)), test_split="val", label="position")


# -- tables -----------------------------------------------------------------------------------------------------------


def table(count: int, offset: int, column: str = "label", names: bool = True, **more: Any) -> datasets.Dataset:
    kinds = ["cat", "dog"]
    values: list[Any] = [number % 2 for number in range(count)]
    features = {"image": datasets.Image(), column: datasets.ClassLabel(names=kinds)}
    if not names:
        values = [kinds[value] for value in values]
        features[column] = datasets.Value("string")
    images = [tiny_image(16, 16, offset=offset + number) for number in range(count)]
    rows = datasets.Dataset.from_dict({"image": images, column: values}, features=datasets.Features(features))
    for name, value in more.items():
        rows = rows.add_column(name, value)  # type: ignore[call-arg]
    return rows


def parquet(folder: Path, **options: Any) -> Path:
    (folder / "data").mkdir(parents=True)
    table(8, 0, **options).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    table(4, 100, **options).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


def saved(folder: Path, **options: Any) -> Path:
    datasets.DatasetDict({"train": table(8, 0, **options), "test": table(4, 100, **options)}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("make", [parquet, saved])
@pytest.mark.parametrize(
    ("options", "reader"),
    [
        ({}, {}),
        ({"names": False}, {}),
        ({"column": "labels"}, {}),
        ({"column": "fine"}, {"options": {"category": "fine"}}),
    ],
)
def test_tables_of_images_and_labels(make: Any, options: dict, reader: dict, tmp_path: Path) -> None:
    data = labelled(source=str(make(tmp_path / "data", **options)), **reader)
    assert data.classes == ("cat", "dog")
    assert [item.label for item in data.test] == [0, 1, 0, 1]
    np.testing.assert_array_equal(np.asarray(load_image(data.test[2].image.source)), np.asarray(tiny_image(offset=102)))


def test_an_option_chooses_among_two_columns_of_labels(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("test", 4)):
        rows = table(count, count, coarse=["animal" if number < count // 2 else "plant" for number in range(count)])
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    assert labelled(source=str(tmp_path)).classes == ("cat", "dog")
    assert labelled(source=str(tmp_path), options={"category": "coarse"}).classes == ("animal", "plant")


def test_probes_on_a_table(tmp_path: Path) -> None:
    config = EncoderEvaluationConfig(
        encoder=str(tiny_encoder(tmp_path / "vision")),
        data={"source": str(parquet(tmp_path / "data"))},
        knn={"k": [1, 2]},
        linear={"steps": 3, "learning_rates": [0.1]},
        bootstrap_samples=100,
        raw_size=4,
        device="cpu",
    )
    results = evaluate_encoder(config, tmp_path / "out")
    assert {(row.probe, row.arm) for row in results.measurements} == {
        (probe, arm) for probe in ("knn", "linear") for arm in ("encoder", "random_weights", "raw_pixels")
    }


def test_a_row_without_label(tmp_path: Path) -> None:
    rows = table(4, 0).to_dict()
    rows["label"] = [0, 1, -1, 0]
    features = table(4, 0).features
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(
        DataError, match=r"train\.parquet, row 2, sample train-2: field 'label': the image has no label"
    ):
        labelled(source=str(tmp_path))


def test_a_split_that_no_file_is_of(tmp_path: Path) -> None:
    parquet(tmp_path)
    with pytest.raises(
        DataError, match=r"no file of the split 'val'; found data/test-00000-of-00001\.parquet, data/tr"
    ):
        labelled(source=str(tmp_path), test_split="val")


def test_one_table_for_both_splits(tmp_path: Path) -> None:
    table(8, 0).to_parquet(str(tmp_path / "part-0.parquet"))
    config = EncoderEvaluationConfig(
        encoder=str(tiny_encoder(tmp_path / "vision")), data={"source": str(tmp_path / "part-0.parquet")}, device="cpu"
    )
    with pytest.raises(DataError, match="every image of the test split is in the train split too"):
        evaluate_encoder(config, tmp_path / "out")


# -- generated scenes -------------------------------------------------------------------------------------------------


def test_position_is_the_ninth_that_the_largest_shape_lies_in() -> None:
    data = labelled(source="generated:shapes", label="position", train_limit=300, test_limit=40)
    assert data.classes == tuple(sorted(f"{row} {column}" for row in ROWS for column in COLUMNS))
    for item in data.test:
        image: Any = item.image.source
        pixels = np.asarray(image).astype(int)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        ink = np.abs(pixels - background).sum(axis=-1) > 60
        name = data.classes[item.label]
        row, column = ROWS.index(name.split()[0]), COLUMNS.index(name.split()[1])
        side = pixels.shape[0] / 3
        # The shape's middle is ink, and lies in the ninth: some ink of the ninth must be there.
        part = ink[int(row * side) : int((row + 1) * side) + 1, int(column * side) : int((column + 1) * side) + 1]
        assert part.any(), name
    assert max(Counter(item.label for item in data.train).values()) < 0.3 * 300, "no ninth is the answer to most"


def test_position_of_one_shape_against_the_middle_of_its_ink() -> None:
    data = labelled(
        source="generated:shapes", label="position", train_limit=300, test_limit=60,
        options={"count": [1, 1], "shape_size": [10, 16], "background": [250, 250]},
    )  # fmt: skip
    for item in data.test:
        image: Any = item.image.source
        rows, columns = np.nonzero(np.abs(np.asarray(image).astype(int) - 250).sum(axis=-1) > 30)
        y, x = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
        near_an_edge = min(abs(v - edge) for v in (y, x) for edge in (64 / 3, 128 / 3)) < 1
        name = f"{ROWS[int(3 * y // 64)]} {COLUMNS[int(3 * x // 64)]}"
        assert near_an_edge or data.classes[item.label] == name


def test_digits_are_labels_of_generated_characters() -> None:
    data = labelled(
        source="generated:characters", train_limit=200, test_limit=20,
        options={"size": [48, 48], "tasks": {"read_number": 1}, "digits": 1},
    )  # fmt: skip
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize("label", ["figure", "colour", "position"])
def test_a_label_that_is_not_of_this_task(label: Any) -> None:
    with pytest.raises(UsageError, match=rf"data\.label: {label} is known of generated:shapes only, found source gen"):
        labelled(source="generated:characters", label=label)
