"""Mistakes of `unclipped eval-encoder`: labels, masks, fine-tuning, recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bad_input.row import Arguments, Row
from bad_input_support import Place
from PIL import Image


def photographs(place: Place) -> str:
    for split in ("train", "test"):
        for number in range(8):
            place.image(f"photos/{split}/{'ab'[number % 2]}/{number}.png", 16 + number, 16 + len(split))
    return "photos"


def probe(*arguments: str, source: Callable[[Place], str] = photographs) -> Arguments:
    return lambda p: ["eval-encoder", p.models.vision, "--data", source(p), *arguments, "--output", "out"]


def ade20k(prepare: Callable[[Place], Any]) -> Arguments:
    """An evaluation on a tiny ADEChallengeData2016 that `prepare` has spoilt."""

    def arguments(place: Place) -> list[Any]:
        for split in ("training", "validation"):
            for name in ("one", "two"):
                place.image(f"ade/images/{split}/{name}.jpg", 12, 20)
                mask(place, f"{split}/{name}", 12, 20, 1)
        prepare(place)
        return ["eval-encoder", place.models.vision, "--segmentation", "ade", "--output", "out"]

    return arguments


def mask(place: Place, name: str, height: int, width: int, value: int) -> None:
    path = place.folder / "ade" / "annotations" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height), value).save(path)


ROWS: dict[str, Row] = {
    "mask missing": Row(
        ade20k(lambda p: (p.folder / "ade/annotations/validation/two.png").unlink()),
        1,
        ("validation/two.jpg", "no mask", "two.png", "add it or remove the image"),
    ),
    "mask of another size": Row(
        ade20k(lambda p: mask(p, "training/one", 6, 10, 1)), 1, ("one.png: 6x10 px", "one.jpg has 12x20", "one size")
    ),
    "mask value above the classes": Row(
        ade20k(lambda p: mask(p, "validation/one", 12, 20, 151)), 1, ("one.png: value 151", "1 to 150", "correct")
    ),
    "masks in no known layout": Row(
        lambda p: ["eval-encoder", p.models.vision, "--segmentation", p.data(), "--output", "out"],
        1,
        ("segmentation data", "<split>/images", "annotations/training", "found good.png", "check source"),
    ),
    "label that class folders do not have": Row(
        probe("data.label=position"), 2, ("data.label: position", "photos", "by their folder", "leave it out")
    ),
    "label of another generated task": Row(
        probe("data.label=figure", source=lambda p: "generated:characters"), 2, ("figure", "generated:shapes", "answer")
    ),
    "fine-tuning without labels": Row(
        lambda p: [*probe()(p)[:2], "--segmentation", "generated:shapes", "fine_tuning.steps=2", "--output", "out"],
        2,
        ("fine_tuning", "data, which is missing"),
    ),
    "fine-tuning at a rate of nothing": Row(
        probe("fine_tuning.learning_rates=[0]"), 2, ("'fine_tuning.learning_rates.0'", "greater than 0")
    ),
    "evaluation recipe of another command": Row(
        probe("--recipe", "nlvr"), 2, ("recipe nlvr", "kind 'train'", "unclipped train nlvr")
    ),
    "data path of a recipe not set": Row(
        lambda p: [
            "eval-encoder",
            p.models.vision,
            "--recipe",
            "probe-category",
            "data.source=$NO_SUCH/x",
            "--output",
            "out",
        ],
        2,
        ("$NO_SUCH/x", "NO_SUCH is not set"),
    ),
}
