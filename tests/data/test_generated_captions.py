"""Captions say what stands in the scene, read back word by word; boxes and masks are those of the painted pixels."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unclipped.core.errors import UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.generated.describing import NUMBERS, SIZE_WORDS, place_word, size_word
from unclipped.data.generated.generator import GENERATORS
from unclipped.data.generated.masks import class_mask, object_masks, packed, unpacked, visible_objects
from unclipped.data.generated.registry import open_generated
from unclipped.data.generated.scene import Scene
from unclipped.data.generated.stencils import FIGURES, figure
from unclipped.data.mixture import Mixture
from unclipped.data.pairs import pair_of
from unclipped.data.sample import Sample
from unclipped.data.sources import open_source

SCENES = ("shapes", "characters", "receipts", "tables", "charts")
LINES: dict[str, Any] = {"size": [96, 160], "lines": [1, 3], "items": [1, 3]}
PARTS = {"bar": "bar", "point": "line", "slice": "pie"}


def drawn(scene: str, count: int, split: str = "train", **options: Any) -> list[Sample]:
    own = {"characters": LINES} | options
    source = open_generated("captions", split, {"scenes": {scene: 1}, **own}, seed=3)
    return [source[i] for i in range(count)]


def objects(sample: Sample, **wanted: Any) -> list[dict[str, Any]]:
    found = sample.metadata["scene"]["objects"]
    return [item for item in found if all(item.get(key) == value for key, value in wanted.items())]


def counts(text: str) -> dict[str, int]:
    """`two circles, one square` → {circle: 2, square: 1}."""
    return {what: NUMBERS.index(number) for number, what in re.findall(rf"({'|'.join(NUMBERS)}) ([a-z]+?)s?\b", text)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_of_shapes_read_back_as_the_scene(split: str) -> None:
    wordings = set()
    for sample in drawn("shapes", 150, split):
        opening, listing = sample.answer.removesuffix(".").lower().split(". ")
        kinds = Counter(item["kind"] for item in objects(sample))
        told = counts(opening)
        assert {kind: told.get(kind, 0) for kind in FIGURES} == {kind: kinds[kind] for kind in FIGURES}
        assert told.get("shape", len(objects(sample))) == len(objects(sample))
        height, width = sample.metadata["scene"]["height"], sample.metadata["scene"]["width"]
        expected, phrases = [], listing.split("; ")
        for item in objects(sample):
            x0, y0, x1, y1 = item["box"]
            row, column = 3 * (y0 + y1) // (2 * height), 3 * (x0 + x1) // (2 * width)
            place = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "middle"
            share = (x1 - x0) / min(height, width)
            size = ("tiny", "small", "medium", "large")[(share >= 1 / 8) + (share >= 3 / 16) + (share >= 1 / 4)]
            expected.append((y0, x0, size, item["colour"], item["kind"], place))
        read = []
        for phrase in phrases:
            words = set(re.findall("[a-z]+", phrase))
            place = re.search(r"(?:at|in) the ((?:top|bottom)? ?(?:left|right)?|middle)(?= an? |,|$)", phrase)
            assert place is not None, phrase
            (size,), (kind,) = words & {word for _, word in SIZE_WORDS}, words & set(FIGURES)
            (colour,) = words & {"red", "green", "blue", "orange", "purple", "black"}
            assert " a orange" not in f" {phrase}"
            read.append((size, colour, kind, place.group(1).strip()))
        assert read == [entry[2:] for entry in sorted(expected, key=lambda entry: entry[:2])]
        wordings.add((opening.split()[0] in ("there", "the"), phrases[0].startswith(("at", "in")), "," in phrases[0]))
    assert len(wordings) >= 5  # the wording varies


def test_captions_of_characters_read_back_as_the_scene() -> None:
    forms = set()
    for sample in drawn("characters", 150):
        opening, *rest = re.findall(r"[^.]+", sample.answer)
        items = objects(sample)
        told = counts(opening.lower())
        what = Counter(item["what"] for item in items)
        assert {kind: told.get(kind, 0) for kind in ("word", "number")} == {k: what[k] for k in ("word", "number")}
        read = re.findall(r'(word|number) "([^"]+)"( in (\w+))?|(\w+) (word|number) "([^"]+)"', " ".join(rest))
        strings = {entry[1] or entry[6] for entry in read}
        assert strings == {item["string"] for item in items}
        for item in items:
            coloured = (f'{item["what"]} "{item["string"]}" in {item["colour"]}', f'{item["colour"]} {item["what"]} "')
            assert any(words in sample.answer for words in coloured)
        if "place" in items[0]:
            forms.add("places")
            for item in items:
                place, string = item["place"], item["string"]
                near = rf'at the {place} the [^,"]*"{string}"|"{string}"[^,"]* at the {place}'
                assert re.search(near, sample.answer, re.IGNORECASE), sample.answer
        else:
            forms.add("lines")
            lines = max(item["line"] for item in items)
            assert told["line"] == lines
            for line, sentence in enumerate(rest, start=1):
                found = [item["string"] for item in objects(sample, line=line)]
                assert re.findall('"([^"]+)"', sentence) == found
                assert lines == 1 or f"line {NUMBERS[line]}" in sentence.lower()
    assert forms == {"places", "lines"}


def test_captions_of_receipts_read_back_as_the_scene() -> None:
    for sample in drawn("receipts", 60):
        goods = re.findall(r'"(\w+)" (?:costs|at) "([\d.]+)"', sample.answer)
        names, prices = objects(sample, role="name"), objects(sample, role="price")
        assert goods == [(name["string"], price["string"]) for name, price in zip(names, prices, strict=True)]
        assert counts(sample.answer.split(". ")[0].lower())["item"] == len(goods)
        shop, date = (objects(sample, role=role)[0]["string"] for role in ("shop", "date"))
        assert re.search(rf'shop (is )?"{shop}"', sample.answer)
        assert re.search(rf'dated? "{date}"', sample.answer)
        assert f'line "total" says "{objects(sample, role="total")[0]["string"]}".' in sample.answer


def test_captions_of_tables_read_back_as_the_scene() -> None:
    styles = set()
    for sample in drawn("tables", 80):
        opening, *rows = sample.answer.split(". ")
        columns = [item["string"] for item in objects(sample, role="column title")]
        assert re.findall('"([^"]+)"', opening) == columns
        told = counts(opening.lower())
        assert (told["row"], told["column"]) == (len(rows), len(columns))
        for number, row in enumerate(rows, start=1):
            strings = re.findall('"([^"]+)"', row)
            (title,) = objects(sample, role="row title", row=number)
            cells = [objects(sample, role="cell", row=number, column=k + 1)[0]["string"] for k in range(len(columns))]
            named = [text for pair in zip(columns, cells, strict=True) for text in pair]
            assert strings == [title["string"], *(named if " is " in row else cells)]
        rules = len(objects(sample, kind="rule"))
        style = "without rules" if not rules else "below its titles" if rules == 1 else "with a grid"
        assert style in opening
        styles.add(style)
    assert len(styles) == 3


@pytest.mark.parametrize("labels", [True, False])
def test_captions_of_charts_read_back_as_the_scene(labels: bool) -> None:
    kinds = ["bar", "line", "pie"] if labels else ["bar", "line"]
    for sample in drawn("charts", 80, charts={"value_labels": labels, "kinds": kinds}):
        parts = [item for item in objects(sample) if item["kind"] in PARTS]
        kind = parts[0]["kind"]
        opening = sample.answer.split(". ")[0].lower()
        assert f"{PARTS[kind]} chart" in opening
        assert counts(opening)[kind] == len(parts)
        quote = '"' if labels else ""
        read = re.findall(rf'"(\w+)" (?:is|stands at) {quote}(\d+){quote}( in (\w+))?', sample.answer)
        colours = [item["colour"] for item in parts]
        assert [(name, int(value)) for name, value, _, _ in read] == [(item["name"], item["value"]) for item in parts]
        if kind == "point":
            assert f"{colours[0]} line" in opening
        else:
            assert [colour for *_, colour in read] == colours
        assert ("axis from" in opening) == (not labels)
        if not labels:
            assert 'its axis from "0" to "100"' in opening


def test_size_and_place_words_at_their_edges() -> None:
    assert [size_word(size, 64, 80) for size in (7, 8, 11, 12, 15, 16)] == [
        *("tiny", "small", "small", "medium", "medium", "large")
    ]
    assert place_word((0, 0, 2, 2), 30, 30) == "top left"
    assert place_word((9, 9, 11, 11), 30, 30) == "middle"
    assert place_word((8, 8, 10, 10), 30, 30) == "top left"
    assert place_word((10, 0, 20, 2), 30, 30) == "top"
    assert place_word((20, 10, 30, 20), 30, 30) == "right"
    assert place_word((29, 29, 30, 30), 30, 30) == "bottom right"


@pytest.mark.parametrize("scene", SCENES)
def test_masks_lie_in_their_boxes_on_ink_of_their_colour(scene: str) -> None:
    for sample in drawn(scene, 25):
        pixels = np.asarray(sample.images[0].source).astype(int)  # (H, W, 3)
        background = np.array(sample.metadata["scene"]["background"])
        masks = object_masks(sample)  # (objects, H, W)
        assert masks.shape == (len(objects(sample)), *pixels.shape[:2])
        assert masks.sum(axis=0).max() == 1  # a pixel shows one object
        for item, mask in zip(objects(sample), masks, strict=True):
            x0, y0, x1, y1 = item["box"]
            inside = np.zeros_like(mask)
            inside[y0:y1, x0:x1] = True
            assert not (mask & ~inside).any(), (sample.id, item)
            assert mask.any(), (sample.id, item)
            # On plain ground the colour tells the coverage: half of the way from background to ink, or more.
            way = np.array(item["rgb"]) - background
            covered = ((pixels - background) @ way) / (way @ way)
            assert (covered[mask] > 0.45).all(), (sample.id, item)
        untouched = (pixels == background).all(axis=2)
        assert not (masks.any(axis=0) & untouched).any()


def test_masks_of_shapes_are_exactly_the_pixels_that_are_mostly_ink() -> None:
    for sample in drawn("shapes", 60, shapes={"count": [3, 6]}):
        pixels = np.asarray(sample.images[0].source).astype(float)
        background = np.array(sample.metadata["scene"]["background"], dtype=float)
        for item, mask in zip(objects(sample), object_masks(sample), strict=True):
            x0, y0, x1, y1 = item["box"]
            way = np.array(item["rgb"]) - background
            covered = ((pixels[y0:y1, x0:x1] - background) @ way) / (way @ way)  # shapes do not touch
            inner = mask[y0:y1, x0:x1]
            assert inner[covered > 0.51].all()
            assert not inner[covered < 0.49].any()
            assert mask.sum() == inner.sum()


def test_what_is_painted_later_covers_what_was_there() -> None:
    scene = Scene(8, 10, (250, 250, 250))
    scene.fill("rule", (0, 0, 6, 8), (0, 0, 0))
    scene.stamp("circle", figure("circle", 5), 4, 1, (200, 0, 0))
    numbers = visible_objects(scene)
    pixels = np.asarray(scene.paint())
    assert set(np.unique(numbers)) == {0, 1, 2}
    assert ((pixels == (0, 0, 0)).all(axis=2) <= (numbers == 1)).all()
    assert ((pixels == (200, 0, 0)).all(axis=2) <= (numbers == 2)).all()
    assert (numbers[:, 9] == 0).all()
    assert (class_mask(scene, ("circle", "rule")) == np.array([0, 2, 1])[numbers]).all()
    for _ in range(260):
        scene.fill("rule", (0, 0, 1, 1), (0, 0, 0))
    with pytest.raises(ValueError, match="at most 255 objects, found 262"):
        visible_objects(scene)


def test_packed_masks_come_back() -> None:
    generator = np.random.default_rng(0)
    for numbers in (
        np.zeros((3, 4), dtype=np.uint8),
        np.full((1, 1), 9, dtype=np.uint8),
        generator.integers(0, 3, (9, 7)).astype(np.uint8),
    ):
        again = unpacked(packed(numbers))
        assert again.dtype == np.uint8
        assert (again == numbers).all()


@pytest.mark.parametrize("scene", SCENES)
def test_a_generator_names_every_kind_that_it_paints(scene: str) -> None:
    found = {item["kind"] for sample in drawn(scene, 80) for item in objects(sample)}
    assert found == set(GENERATORS.get(scene).kinds)


def test_every_sample_is_a_pair_and_an_image() -> None:
    config = SourceConfig(source="generated:captions", options={"phrasing": "full", "size": [48, 80]})
    source = open_source(config)
    instructions = set()
    for index in range(20):
        sample = source[index]
        image, caption = pair_of(sample)
        assert isinstance(image.source, Image.Image)
        assert image.source.size == (80, 48)
        assert caption == sample.answer == sample.answers[0]
        assert sample.category == "shapes"
        instructions.add(sample.question)
    assert len(instructions) == 3
    mixture = Mixture(DataConfig(sources=(config,)), seed=0)
    assert [mixture.read(i).id for i in range(3)] == [source[i].id for i in range(3)]


def test_one_size_for_all_scenes_unless_a_scene_names_its_own() -> None:
    options = {"scenes": dict.fromkeys(SCENES, 1), "size": [112, 176], "tables": {"size": [128, 200], "rows": 2}}
    source = open_generated("captions", "val", options)
    sizes: dict[str, set[Any]] = {}
    for index in range(60):
        sample = source[index]
        picture = sample.images[0].source
        assert isinstance(picture, Image.Image)
        sizes.setdefault(str(sample.category), set()).add(picture.size)
        if sample.category not in ("shapes", "characters"):
            assert sample.metadata["held_out"]  # words of val stand in no training image
    assert sizes == {scene: {(200, 128) if scene == "tables" else (176, 112)} for scene in SCENES}


def test_the_scene_of_a_sample() -> None:
    source = open_generated("captions", "train", seed=4)
    assert source.scene(3).as_dict() == source[3].metadata["scene"]
    with pytest.raises(UsageError, match="generated:majority draws no image"):
        open_generated("majority", "train").scene(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenes": {"shaps": 1}}, r"options\.scenes\.shaps: .*did you mean 'shapes'"),
        ({"scenes": {}}, r"options\.scenes: "),
        ({"scenes": {"shapes": 0}}, "one of them positive"),
        ({"shapes": {"cont": 3}}, r"unknown option 'shapes\.cont'; did you mean 'count'"),
        ({"shapes": {"count": [6, 2]}}, r"options\.shapes\.count: expected \[low, high\]"),
        ({"size": [24, 24]}, "shape_size: expected values from 5 to 12"),
        ({"scenes": {"charts": 1}, "size": [64, 64]}, r"options\.size 64×64 leaves"),
        ({"siz": 3}, "unknown option 'siz'; did you mean 'size'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_generated("captions", "train", options)
    assert "\n" not in str(caught.value)
