"""Augmentation: deterministic, words move with panels, and what could change meaning is left alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.tiny_models import tiny_image
from unclipped.core.documents import read_jsonl
from unclipped.data.augment import augment, permute_panels, rename, scale_and_shift
from unclipped.data.config import AugmentConfig, DataConfig
from unclipped.data.mixture import Mixture
from unclipped.data.sample import ImagePart, Sample, SampleGroup
from unclipped.images.decode import read_header
from unclipped.images.prepare import decoded

PANELS = [[0, 0.25], [0.375, 0.625], [0.75, 1]]
BOXES = {"kind": "permute_panels", "panels": PANELS, "names": ["left", "middle", "right"]}
COLOURS = {"left": (255, 0, 0), "middle": (0, 255, 0), "right": (0, 0, 255)}
STEPS: list[dict[str, Any]] = [
    BOXES,
    {"kind": "mirror_panels"},
    {"kind": "geometric"},
    {"kind": "photometric"},
    {"kind": "random_crop"},
]


def config_of(*steps: dict[str, Any]) -> AugmentConfig:
    return AugmentConfig.model_validate({"steps": steps})


def boxes() -> Image.Image:
    """Three boxes of one colour each between grey gaps, 400 x 100 px."""
    image = Image.new("RGB", (400, 100), (128, 128, 128))
    for number, colour in enumerate(COLOURS.values()):
        image.paste(colour, (150 * number, 0, 150 * number + 100, 100))
    return image


def colour_at(image: Image.Image, name: str) -> tuple[int, ...]:
    place = list(COLOURS).index(name)
    return image.getpixel((150 * place + 50, 50))  # type: ignore[return-value]


def pixels_of(sample: Sample | SampleGroup) -> np.ndarray:
    return np.asarray(decoded(sample.images[0]))


@pytest.mark.parametrize("step", [BOXES, {"kind": "mirror_panels", "probability": 1.0}])
@pytest.mark.parametrize("seed", range(8))
def test_words_follow_their_panels(step: dict[str, Any], seed: int) -> None:
    """Whatever a sample says about the box called X holds of the same colours after the change."""
    samples = tuple(
        Sample.qa(name, [ImagePart(boxes(), "boxes")], f"Is it in the {name} box?", name, choices=tuple(COLOURS))
        for name in COLOURS
    )
    changed = augment(SampleGroup(samples), config_of(step), np.random.default_rng(seed))
    assert isinstance(changed, SampleGroup)
    for before, after in zip(samples, changed.samples, strict=True):
        image = decoded(after.images[0])
        assert colour_at(image, after.answer) == COLOURS[before.answer]
        assert after.question == f"Is it in the {after.answer} box?"
        assert after.answers == (after.answer,)
        assert image.getpixel((125, 50)) == (128, 128, 128)
    assert sorted(sample.answer for sample in changed.samples) == sorted(COLOURS)


def test_questions_about_order_keep_their_image() -> None:
    sample = Sample.qa("a", [ImagePart(boxes())], "Is the red box left of the blue one?", "yes")
    assert all(
        (pixels_of(augment(sample, config_of(BOXES), np.random.default_rng(seed))) == np.asarray(boxes())).all()
        for seed in range(8)
    )


def test_mirroring_swaps_extremes_but_not_other_words() -> None:
    table = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
    assert rename("The LEFT box, leftmost; Right, leftover, right-hand", table) == (
        "The RIGHT box, rightmost; Left, leftover, right-hand"
    )


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(3)))
def test_permuting_back_restores_the_image(order: list[int]) -> None:
    panels = tuple((left, right) for left, right in PANELS)
    moved = permute_panels(tiny_image(20, 400), panels, tuple(order))
    back = permute_panels(moved, panels, tuple(int(k) for k in np.argsort(order)))
    assert (np.asarray(back) == np.asarray(tiny_image(20, 400))).all()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["kind"])
def test_steps_are_functions_of_the_generator(step: dict[str, Any]) -> None:
    sample = Sample.qa("a", [ImagePart(tiny_image(32, 96))], "left", "right")
    once, again = (augment(sample, config_of(step), np.random.default_rng(5)) for _ in range(2))
    assert (pixels_of(once) == pixels_of(again)).all()
    assert isinstance(once, Sample)
    assert isinstance(again, Sample)
    assert once.answer == again.answer
    others = [augment(sample, config_of(step), np.random.default_rng(seed)) for seed in range(6)]
    assert len({pixels_of(other).tobytes() for other in others}) > 1


def test_draws_of_a_mixture_are_augmented_alike_each_time() -> None:
    class One:
        name, length = "one", 3

        def __getitem__(self, index: int) -> Sample:
            return Sample.qa(f"a{index}", [ImagePart(tiny_image(16, 48))], "what", "red")

    fields = {"sources": [{"source": "one"}], "augment": {"steps": STEPS}}
    mixtures = [Mixture(DataConfig.model_validate(fields), 3, sources=[One()]) for _ in range(2)]
    for index in (4, 0, 2):
        assert (pixels_of(mixtures[0].sample(index)) == pixels_of(mixtures[1].sample(index))).all()
    assert (
        pixels_of(mixtures[0].sample(0)).shape != pixels_of(mixtures[0].sample(3)).shape
        or (pixels_of(mixtures[0].sample(0)) != pixels_of(mixtures[0].sample(3))).any()
    )


@settings(max_examples=30, deadline=None)
@given(
    scale=st.tuples(st.floats(0.85, 1.15), st.floats(0.85, 1.15)),
    shift=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 90)),
)
def test_geometry_keeps_the_height_and_a_plain_background(
    scale: tuple[float, float], shift: tuple[int, int], size: tuple[int, int]
) -> None:
    image = Image.new("RGB", size[::-1], (240, 230, 220))
    changed = scale_and_shift(image, *scale, *shift)
    assert changed.height == image.height
    assert changed.width == max(1, round(image.width * scale[1]))
    assert set(changed.getdata()) == {(240, 230, 220)}


def test_images_without_steps_and_samples_without_images_pass_unchanged() -> None:
    sample = Sample.qa("a", [], "left", "right")
    assert augment(sample, config_of(*STEPS), np.random.default_rng(0)) is sample


def test_a_blind_run_reads_the_texts_of_the_seeing_one() -> None:
    class One:
        name, length = "one", 5

        def __getitem__(self, index: int) -> Sample:
            return Sample.qa(f"a{index}", [ImagePart(boxes())], "in the left box?", "right")

    fields = {"sources": [{"source": "one"}], "augment": {"steps": STEPS}}
    seeing, blind = (
        Mixture(DataConfig.model_validate({**fields, "blind": flag}), 3, sources=[One()]) for flag in (None, "removed")
    )
    for index in range(10):
        one, other = seeing.sample(index), blind.sample(index)
        assert isinstance(one, Sample)
        assert isinstance(other, Sample)
        assert (one.question, one.answer) == (other.question, other.answer)
        assert other.images == ()


def test_the_header_gives_the_upright_size(tmp_path: Path) -> None:
    image = tiny_image(10, 30)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_header(tmp_path / "a.jpg") == (30, 10, "RGB")
    with Image.open(tmp_path / "a.jpg") as opened:
        assert read_header(opened) == (30, 10, "RGB")
    assert read_header(tiny_image(10, 30)) == (10, 30, "RGB")


# What the real questions say


def test_permuted_scenes_answer_their_questions_alike(data_folder: Path) -> None:
    """Read the boxes back from permuted scenes: counts per box, the answer to 'how many in the X box', stay right."""
    rows = [row for _, row in read_jsonl(data_folder / "nlvr" / "train.jsonl")]
    asked = [row for row in rows if row["category"] == "count-box-color"][:40]
    for number, row in enumerate(asked):
        sample = Sample.qa(row["id"], [str(data_folder / "nlvr" / row["image"])], row["question"], row["answer"])
        changed = augment(sample, config_of(BOXES), np.random.default_rng(number))
        assert isinstance(changed, Sample)
        boxes_before, boxes_after = (box_of(item) for item in (sample, changed))
        assert (boxes_before == boxes_after).all()
        assert changed.answer == sample.answer


def box_of(sample: Sample) -> np.ndarray:
    """Pixels of the box that the question names."""
    image = decoded(sample.images[0])
    found = re.search(r"\b(left|middle|right) box", sample.question)
    assert found is not None
    place = ["left", "middle", "right"].index(found.group(1))
    return np.asarray(image)[:, 150 * place : 150 * place + 100]


def test_no_scene_question_speaks_of_panels_in_other_words(data_folder: Path) -> None:
    """Every position word of the questions is a panel's name or an extreme inside one box."""
    words = set()
    for _, row in read_jsonl(data_folder / "nlvr" / "train.jsonl"):
        question = row["question"].lower()
        words.update(re.findall(r"[a-z]+", re.sub(r"\b(left|middle|right) box\b", "box", question)))
    position = {word for word in words if re.search("left|right|mid|cent|first|second|third|next|side|between", word)}
    assert position <= {"leftmost", "rightmost"}
