"""A whole evaluation on small data, its files, and the mistakes that can be made in its data and settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import unclipped.audit.runner as runner
from support.tiny_models import tiny_encoder, tiny_lm
from unclipped.audit.config import EncoderEvaluationConfig, LabelledDataConfig
from unclipped.audit.data import cut_development, load_labelled
from unclipped.audit.results import shown
from unclipped.audit.runner import evaluate_encoder
from unclipped.core.errors import DataError, ImageError, UnclippedError, UsageError

SHORT: dict[str, Any] = {
    "linear": {"steps": 60, "batch_size": 8, "learning_rates": [0.1, 1.0]},
    "knn": {"k": [1, 3]},
    "bootstrap_samples": 100,
    "raw_size": 4,
    "device": "cpu",
}
COLOURS = {"blue": (30, 40, 200), "red": (200, 40, 30)}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_encoder(tmp_path_factory.mktemp("models") / "vision"))


def paint(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 20, size=(16, 16, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)


def class_folders(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """<split>/<colour>/<number>.png"""
    for split, count in (counts or {"train": 10, "test": 6}).items():
        for number, (name, colour) in enumerate(COLOURS.items()):
            for image in range(count):
                paint(folder / split / name / f"{image}.png", colour, 1000 * len(split) + 100 * number + image)
    return folder


def questions(folder: Path, change: Callable[[str, int, dict], dict] = lambda split, i, row: row) -> Path:
    """train.jsonl and test.jsonl with one question; `change(split, number, row)` may alter rows."""
    for split, count in (("train", 8), ("test", 4)):
        rows = []
        for image in range(count):
            name = list(COLOURS)[image % 2]
            paint(folder / f"{split}-{image}.png", COLOURS[name], 50 * len(split) + image)
            row = {"id": f"{split}-{image}", "image": f"{split}-{image}.png", "question": "which?", "answer": name}
            rows.append(change(split, image, {**row, "category": f"kind of {name}"}))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(vision: str, source: Path | str, **changes: Any) -> EncoderEvaluationConfig:
    return EncoderEvaluationConfig(**({"encoder": vision, "data": {"source": str(source)}, **SHORT} | changes))


def quiet() -> Console:
    return Console(quiet=True)


def test_a_whole_evaluation(vision: str, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data")
    segmentation = {"train_limit": 6, "test_limit": 4, "steps": 3}
    wanted = config(vision, data, segmentation=segmentation)
    results = evaluate_encoder(wanted, tmp_path / "out", console=quiet())
    assert results.of("linear").figure.value == 1.0, "two colours are told apart by any encoder"
    assert results.of("knn").figure.count == 12
    arms = ("encoder", "random_weights", "raw_pixels")
    assert [(row.probe, row.arm) for row in results.measurements] == [
        *((probe, arm) for arm in arms for probe in ("knn", "linear")), *(("segmentation", arm) for arm in arms),
    ]  # fmt: skip
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["encoder"]["family"] == "dinov2"
    assert found["data"]["labelled"]["classes"] == ["blue", "red"]
    assert (found["data"]["labelled"]["train"], found["data"]["labelled"]["development"]) == (16, 4)
    assert found["probes"]["segmentation"]["encoder"]["classes"].keys() <= {
        "background", "circle", "square", "triangle",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * 12
    for probe in ("knn", "linear"):
        right = {
            arm: [row["label"] == row["predicted"] for row in rows if (row["probe"], row["features"]) == (probe, arm)]
            for arm in arms
        }
        for arm in arms:
            assert found["probes"][probe][arm]["accuracy"] == pytest.approx(np.mean(right[arm]))
        for arm in arms[1:]:
            difference = found["probes"][probe]["differences"][arm]["value"]
            assert difference == pytest.approx(np.mean(right["encoder"]) - np.mean(right[arm]))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| linear | random weights |" in report
    assert "| mIoU | raw pixels |" in report


def test_an_interrupted_evaluation_ends_alike(vision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(vision, class_folders(tmp_path / "data"))
    evaluate_encoder(wanted, tmp_path / "whole", console=quiet())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "knn_predict", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate_encoder(wanted, tmp_path / "out", console=quiet())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"features"}
    evaluate_encoder(wanted, tmp_path / "out", console=quiet())
    for name in ("results.json", "predictions.jsonl", "report.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_test_split_chooses_nothing(vision: str, tmp_path: Path) -> None:
    """With all test labels wrong, the chosen settings are the same and the figures are those of the wrong labels."""
    swap = {"blue": "red", "red": "blue"}
    honest = questions(tmp_path / "honest")
    wrong = questions(
        tmp_path / "wrong", lambda split, i, row: row | ({"answer": swap[row["answer"]]} if split == "test" else {})
    )
    one, two = (
        evaluate_encoder(config(vision, data), tmp_path / data.name, console=quiet()) for data in (honest, wrong)
    )
    for first, second in zip(one.measurements, two.measurements, strict=True):
        assert (first.chosen, first.development) == (second.chosen, second.development)
        assert first.figure.value == pytest.approx(1 - second.figure.value)


def test_test_images_that_were_trained_on_are_counted(vision: str, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data")
    paint(data / "test" / "red" / "copy.png", COLOURS["red"], 5000 + 100 + 2)
    results = evaluate_encoder(config(vision, data, compare=(), probes=("knn",)), tmp_path / "out", console=quiet())
    assert results.data["labelled"]["test_images_in_train"] == 1
    assert "1 test images are in the train split too" in (tmp_path / "out" / "report.md").read_text()


def test_generated_images_and_an_encoder_made_of_a_language_model(tmp_path: Path) -> None:
    tiny_lm(tmp_path / "lm")
    data = {"source": "generated:shapes", "train_limit": 24, "test_limit": 8}
    wanted = config(f"llm:{tmp_path / 'lm'}", "", data=data, image_size=32, patch_size=8)
    results = evaluate_encoder(wanted, tmp_path / "out", console=quiet())
    assert results.data["labelled"]["classes"] == ["circle", "square", "triangle"]
    assert results.of("linear").chosen.startswith("last")


@pytest.mark.parametrize(
    ("label", "classes"), [("auto", ("blue", "red")), ("category", ("kind of blue", "kind of red"))]
)
def test_labels_of_question_files(tmp_path: Path, label: Any, classes: tuple[str, ...]) -> None:
    data = load_labelled(LabelledDataConfig(source=str(questions(tmp_path)), label=label))
    assert data.classes == classes
    assert [item.label for item in data.test] == [0, 1, 0, 1]


def test_colours_of_generated_shapes() -> None:
    data = load_labelled(LabelledDataConfig(source="generated:shapes", label="colour", train_limit=80, test_limit=10))
    assert {"red", "green", "blue"} <= set(data.classes)


def test_the_development_part_holds_every_class_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    data = load_labelled(LabelledDataConfig(source=str(class_folders(tmp_path)), test_limit=4))
    learn, choose = cut_development(data.train, 0.2, 0)
    assert sorted([*learn, *choose]) == list(range(20))
    assert sorted(data.train[i].label for i in choose) == [0, 0, 1, 1]
    backwards = data.train[::-1]
    _, again = cut_development(backwards, 0.2, 0)
    assert {backwards[i].id for i in again} == {data.train[i].id for i in choose}
    assert cut_development(data.train, 0.2, 1)[1] != choose
    assert {item.label for item in data.test} == {0, 1}, "a limit does not cut off the last classes"


def broken_image(folder: Path) -> Path:
    (class_folders(folder) / "train" / "red" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return folder


def without(**fields: Any) -> Callable[[Path], Path]:
    return lambda folder: questions(folder, lambda split, i, row: row | fields if split == "train" else row)


def one_hat(where: str) -> Callable[[Path], Path]:
    """The third sample of one split is of a class that occurs nowhere else."""
    return lambda folder: questions(
        folder, lambda split, i, row: row | {"answer": "hat"} if (split, i) == (where, 2) else row
    )


@pytest.mark.parametrize(
    ("make", "changes", "kind", "message"),
    [
        (without(answer="blue"), {}, DataError, r"train split has one class only \('blue'\)"),
        (lambda folder: class_folders(folder, {"train": 4}), {}, DataError, "no folder 'test'; found train"),
        (
            one_hat("test"), {}, DataError, "sample test-2 of the test split is of class 'hat', which the train",
        ),
        (
            one_hat("train"), {}, DataError, "class 'hat' has 1 image in the train split; expected at least 2",
        ),
        (broken_image, {}, ImageError, r"red/3\.png: "),
        (
            lambda folder: questions(folder, lambda split, i, row: row | {"question": f"which {i % 2}?"}),
            {}, DataError, "several questions .* keep one question, or set label: category",
        ),
        (without(image=None), {}, DataError, "sample train-0: expected exactly one image, found 0"),
        (without(answer=None), {}, DataError, "sample train-0: field 'answer': missing"),
        (class_folders, {"knn": {"k": [1, 500]}}, UsageError, r"knn\.k: 500 neighbours asked for"),
        (class_folders, {"image_size": 20}, UsageError, "image_size: 20x20 px is no multiple"),
        (class_folders, {"patch_size": 8}, UsageError, "patch_size: only for encoders made of a language model"),
        (class_folders, {"encoder": "nowhere/at/all"}, UnclippedError, "no such folder"),
        (
            class_folders, {"data": {"source": "{}", "train_split": "test"}}, UsageError,
            "train_split and test_split are both 'test'",
        ),
        (class_folders, {"data": {"source": "$NOT_SET_HERE/x"}}, UsageError, "NOT_SET_HERE is not set"),
    ],
)  # fmt: skip
def test_mistakes(
    vision: str,
    tmp_path: Path,
    make: Callable[[Path], Path],
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    folder = make(tmp_path / "data")
    changes = json.loads(json.dumps(changes).replace("{}", str(folder))) if "data" in changes else changes
    with pytest.raises(kind, match=message):
        evaluate_encoder(config(vision, folder, **changes), tmp_path / "out", console=quiet())
    assert not (tmp_path / "out").exists() or "knn" in changes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing to measure"),
        ({"data": {"source": "x"}, "probes": []}, "data is given but no probe"),
        ({"segmentation": {}, "resize": "crop"}, "segmentation needs resize: squash"),
        ({"data": {"source": "x"}, "knn": {"k": []}}, "at least one number of neighbours"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderEvaluationConfig(encoder="x", **fields)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("/home/me/runs/vit/model", "…/vit/model"),
        ("llm:/models/lm", "llm:…/models/lm"),
        ("runs/vit/model", "runs/vit/model"),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("llm:Qwen/Qwen3-0.6B", "llm:Qwen/Qwen3-0.6B"),
        ("generated:shapes", "generated:shapes"),
    ],
)
def test_reports_show_no_folders_of_the_machine(source: str, text: str) -> None:
    assert shown(source) == text
