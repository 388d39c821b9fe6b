"""Every generator: deterministic, disjoint between splits, hard to guess, and the same scene as image and as text."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest

from unclipped.core.errors import UsageError
from unclipped.data.generated.contact_sheet import contact_sheet
from unclipped.data.generated.generator import GENERATORS, spelled
from unclipped.data.generated.options import OPTIONS, NeedleTask, equal_weights
from unclipped.data.generated.registry import open_generated
from unclipped.data.generated.vocabulary import is_held_out, split_of, split_of_whole
from unclipped.data.sample import Sample
from unclipped.data.sources import Source

LINES: dict[str, Any] = {"size": [96, 160], "lines": [1, 3], "items": [1, 3], "digits": [1, 4], "word_length": [3, 6]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "characters": ("characters", {}),
    "lines": ("characters", {**LINES, "fonts": ["sans", "mono-bold", "serif"], "font_size": [10, 16]}),
    "lines_english": ("characters", {**LINES, "words": "english"}),
    "shapes": ("shapes", {}),
    "receipts": ("receipts", {}),
    "tables": ("tables", {}),
    "charts": ("charts", {}),
    "charts_axis": ("charts", {"value_labels": False, "kinds": ["bar", "line"]}),
    "captions": ("captions", {}),
    "captions_of_all": (
        "captions",
        {"scenes": {"shapes": 1, "characters": 1, "receipts": 1, "tables": 1, "charts": 1}, "characters": LINES},
    ),
    "majority": ("majority", {}),
    "needle": ("needle", {}),
}
IMAGES = [case for case in CASES if case != "majority"]


@cache
def text_samples(case: str, split: str, count: int) -> tuple[Sample, ...]:
    """Samples without painted images: the scenes and answers are the same, and cheaper."""
    name, options = CASES[case]
    options = options if name == "majority" else {**options, "as_text": True}
    source = open_generated(name, split, options, seed=3)
    return tuple(source[i] for i in range(count))


def shown(sample: Sample) -> list[str]:
    """Every string that a sample shows or expects."""
    # A caption is a frame of words that every split shares, around what it quotes from the image.
    is_caption = sample.metadata["generator"] == "captions"
    strings = re.findall(r'"([^"]*)"|(?<= )(\d+)', sample.answer) if is_caption else [sample.answer]
    strings = ["".join(found) for found in strings] + list(sample.choices or ())
    strings += [item["string"] for item in sample.metadata.get("scene", {}).get("objects", []) if "string" in item]
    return strings


def count_of(case: str) -> int:
    return 2500 if case == "characters" else 500


@pytest.mark.parametrize("case", CASES)
def test_a_sample_depends_on_its_index_alone(case: str) -> None:
    name, options = CASES[case]
    one, two = (open_generated(name, "train", options, seed=5) for _ in range(2))
    assert isinstance(one, Source)
    assert one.length is None
    forward = [one[i] for i in range(12)]
    backward = [two[i] for i in reversed(range(12))][::-1]
    for first, second in zip(forward, backward, strict=True):
        assert (first.id, first.question, first.answer) == (second.id, second.question, second.answer)
        assert first.metadata == second.metadata
        for a, b in zip(first.images, second.images, strict=True):
            assert a.source.tobytes() == b.source.tobytes()  # type: ignore[union-attr]
    again = pickle.loads(pickle.dumps(one))
    assert again[7].metadata == forward[7].metadata


@pytest.mark.parametrize("case", CASES)
def test_streams_differ_by_seed_and_split(case: str) -> None:
    name, options = CASES[case]
    keys = set()
    for split in ("train", "val", "test"):
        for seed in (0, 1):
            source = open_generated(name, split, options, seed=seed)
            for i in range(10):
                sample = source[i]
                keys.add((sample.question, json.dumps(sample.metadata["transcript"]), json.dumps(_boxes(sample))))
    assert len(keys) == 60


def _boxes(sample: Sample) -> list[Any]:
    return [item["box"] for item in sample.metadata.get("scene", {}).get("objects", [])]


@pytest.mark.parametrize("case", CASES)
def test_train_never_shows_what_is_held_out(case: str) -> None:
    for sample in text_samples(case, "train", count_of(case)):
        assert not [text for text in shown(sample) if is_held_out(text)], sample.id
        assert not sample.metadata["held_out"]


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_splits_show_no_word_of_another_split(case: str, split: str) -> None:
    for sample in text_samples(case, split, count_of(case) // 2):
        for text in shown(sample):
            assert split_of(text) in ("train", split), (sample.id, text)
        for item in sample.metadata["scene"]["objects"]:
            word = item.get("string", "")
            if word.isalpha() and item.get("role") != "title":
                assert split_of(word) == split, (sample.id, word)


@pytest.mark.parametrize("case", ["characters", "lines", "receipts", "tables"])
def test_reads_of_text_are_held_out_and_numbers_are_mixed(case: str) -> None:
    train_text = " ".join(text for sample in text_samples(case, "train", count_of(case)) for text in shown(sample))
    flags: dict[str, list[bool]] = defaultdict(list)
    for sample in text_samples(case, "test", count_of(case)):
        flags[sample.category or ""].append(sample.metadata["held_out"])
        if sample.category in ("read_text", "read_number"):
            assert sample.metadata["held_out"] == is_held_out(sample.answer)
        if sample.metadata["held_out"] and sample.category == "read_text":
            assert sample.answer not in train_text
    assert all(flags["read_text"])
    assert 0.25 < sum(flags["read_number"]) / len(flags["read_number"]) < 0.8


def test_rows_of_class_words_belong_to_one_split() -> None:
    for split in ("train", "val", "test"):
        for sample in text_samples("majority", split, 200):
            row = sample.question.removeprefix("photo: ")
            assert split_of_whole(row) == split
            (winner, times), *others = Counter(word for word in row.split() if word != ".").most_common()
            assert winner == sample.answer
            assert all(count < times for _, count in others)
            assert len(row.split()) == 16


# Share of the commonest answer to one question, and of the commonest answer of a whole category: what a model that sees
# no image can reach by heart. Two places, or two counts of columns, make a half.
CEILINGS = {
    "read_number": 0.12,
    "read_text": 0.12,
    "read_kth": 0.36,
    "count": 0.62,
    "colour": 0.30,
    "compare": 0.15,
    "locate": 0.60,
    "majority": 0.20,
    # captions, by the kind of scene
    **dict.fromkeys(("shapes", "characters", "receipts", "tables", "charts"), 0.05),
    **dict.fromkeys(equal_weights(NeedleTask), 0.16),
}


@pytest.mark.parametrize("case", CASES)
def test_blind_guessing_stays_low(case: str) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    by_question: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in text_samples(case, "test", count_of(case)):
        category = sample.category or ""
        answers[category][sample.answer] += 1
        question = sample.question.removeprefix(sample.metadata["transcript"])
        by_question[category, question][sample.answer] += 1
    for category, counter in answers.items():
        assert counter.most_common(1)[0][1] / counter.total() <= CEILINGS[category], (category, counter.most_common(3))
    for (category, question), counter in by_question.items():
        if counter.total() >= 80:
            share = counter.most_common(1)[0][1] / counter.total()
            assert share <= CEILINGS[category], (question, counter.most_common(3))


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("phrasing", ["short", "full"])
def test_text_and_image_ask_the_same(case: str, phrasing: str) -> None:
    name, options = CASES[case]
    image = open_generated(name, "val", {**options, "phrasing": phrasing}, seed=1)
    text = open_generated(name, "val", {**options, "phrasing": phrasing, "as_text": True}, seed=1)
    for i in range(25):
        seen, told = image[i], text[i]
        assert len(seen.images) == 1
        assert not told.images
        assert told.question == f"{seen.metadata['transcript']}; {seen.question}"
        assert (seen.answer, seen.category, seen.metadata) == (told.answer, told.category, told.metadata)
        for item in seen.metadata["scene"]["objects"]:
            if "string" in item and item.get("role") not in ("title", "tick"):
                assert spelled(item["string"]) in seen.metadata["transcript"]


@pytest.mark.parametrize("case", IMAGES)
def test_categories_choices_and_metadata(case: str) -> None:
    name, options = CASES[case]
    source = open_generated(name, "test", options, seed=2)
    asked = set()
    for i in range(150):
        sample = source[i]
        asked.add(sample.category)
        assert sample.question
        assert sample.answer
        assert sample.id == f"{name}-test-2-{i}"
        if sample.choices is not None:
            assert sample.answer in sample.choices
            assert len(set(sample.choices)) == len(sample.choices)
        json.dumps(dict(sample.metadata))
    assert asked == set(source.generator.tasks)


def test_task_weights_choose_categories() -> None:
    source = open_generated("characters", "train", {"tasks": {"read_number": 1, "read_text": 3, "colour": 0}}, seed=0)
    counts = Counter(source[i].category for i in range(400))
    assert set(counts) == {"read_number", "read_text"}
    assert counts["read_text"] / 400 == pytest.approx(0.75, abs=0.08)


def test_every_generator_has_options_and_a_case() -> None:
    assert set(GENERATORS.names()) == set(OPTIONS) == {name for name, _ in CASES.values()}


def test_an_endless_source_has_no_end() -> None:
    source = open_generated("shapes", "train")
    assert source[10**12].id == f"shapes-train-0-{10**12}"
    with pytest.raises(TypeError, match="endless"):
        len(source)
    with pytest.raises(IndexError, match="no last sample"):
        source[-1]


def test_noise_is_repeatable_and_about_as_strong_as_asked() -> None:
    plain = open_generated("characters", "train", {"background": 180}, seed=4)
    noisy = open_generated("characters", "train", {"background": 180, "noise": 12}, seed=4)
    twin = open_generated("characters", "train", {"background": 180, "noise": 12}, seed=4)
    image = np.asarray(noisy[0].images[0].source, dtype=float)
    assert np.array_equal(image, np.asarray(twin[0].images[0].source))
    assert not np.array_equal(image, np.asarray(noisy[1].images[0].source))
    assert np.asarray(plain[0].images[0].source, dtype=float).shape == image.shape
    background = image[np.abs(image - 180).max(axis=2) < 60]
    assert background.std() == pytest.approx(12, abs=1.5)


def test_contact_sheet_shows_images_and_texts() -> None:
    for case in ("characters", "majority"):
        name, options = CASES[case]
        sheet = contact_sheet(open_generated(name, "train", options), 5, columns=3, enlarge=2)
        assert sheet.mode == "RGB"
        assert sheet.width >= 3 * 128
        assert len(set(sheet.convert("L").tobytes())) > 10


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("charcters", "train", {}, "did you mean 'characters'"),
        ("shapes", "dev", {}, "unknown split 'dev'"),
        ("characters", "train", {"font": ["sans"]}, "unknown option 'font'; did you mean 'fonts'"),
        ("characters", "train", {"fonts": ["sanz"]}, "did you mean 'sans'"),
        ("characters", "train", {"tasks": {"read_nmber": 1}}, "did you mean 'read_number'"),
        ("characters", "train", {"tasks": {"colour": 0}}, "one of them positive"),
        ("characters", "train", {"tasks": {"colour": -1}}, "options.tasks.colour"),
        ("characters", "train", {"word_length": [5, 3]}, "swap the two"),
        ("characters", "train", {"word_length": 2}, "word_length: expected values from 3 to 12"),
        ("characters", "train", {"noise": "loud"}, "options.noise: .*found 'loud'"),
        ("characters", "train", {"size": [24, 32], "word_length": 8}, "options.size 24×32 leaves"),
        ("characters", "train", {"lines": 4, "items": 3}, "at most 9 items"),
        ("characters", "train", {"colours": ["red", "red"]}, "the same name twice"),
        ("characters", "train", {"phrasing": "ful"}, "did you mean 'full'"),
        ("shapes", "train", {"count": [1, 10]}, "count: expected values from 1 to 9"),
        ("shapes", "train", {"shape_size": [10, 12]}, "1.6 times"),
        ("shapes", "train", {"count": 1}, "two shapes are needed"),
        ("charts", "train", {"bars": 6, "colours": ["red", "blue"]}, "need as many colours"),
        ("charts", "train", {"bars": 7}, "bars: expected values from 2 to 6"),
        ("receipts", "train", {"digits": 5}, "digits: expected values from 1 to 4"),
        ("tables", "train", {"rows": 1}, "rows: expected values from 2 to 9"),
        ("tables", "val", {"word_length": 8}, "English words of that length"),
        ("needle", "train", {"cells": [0, 6]}, "options.cells"),
        ("needle", "train", {"cells": [2, 6], "tasks": {"top left": 1}}, "'top left' holds no cell of 2×6"),
        ("needle", "train", {"size": [96, 96]}, "options.size 96×96 leaves"),
        ("majority", "train", {"classes": ["hat"]}, "options.classes"),
        ("majority", "train", {"classes": ["hat", "."]}, "other than a dot"),
        ("majority", "train", {"dots": [0.6, 0.2]}, "swap the two"),
    ],
)
def test_bad_options_are_named(name: str, split: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_generated(name, split, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tables", {"size": [24, 40]}),
        ("receipts", {"size": [32, 32]}),
        ("charts", {"size": [32, 48]}),
        ("charts", {"size": [96, 96], "kinds": ["pie"]}),
    ],
)
def test_images_too_small_for_their_scene_say_so(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"options\.size"):
        open_generated(name, "train", options)
