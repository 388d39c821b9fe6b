"""The ground truth of a scene agrees with the pixels, and answers follow from the ground truth."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from unclipped.data.generated.lettering import FONT_FILES, letter
from unclipped.data.generated.options import FontName
from unclipped.data.generated.phrasing import PHRASES
from unclipped.data.generated.registry import open_generated
from unclipped.data.sample import Sample

LINES = {"size": [96, 160], "lines": [1, 3], "items": [1, 3], "fonts": ["sans", "serif-italic", "mono"]}
SCENES: list[tuple[str, dict[str, Any]]] = [
    ("characters", {}),
    ("characters", LINES),
    ("shapes", {}),
    ("shapes", {"size": [40, 90], "count": [5, 9]}),
    ("receipts", {}),
    ("receipts", {"size": [160, 120], "items": [3, 9]}),
    ("tables", {}),
    ("tables", {"words": "syllables", "rows": [2, 7], "columns": [2, 5], "size": [128, 224]}),
    ("charts", {}),
    ("charts", {"value_labels": False, "kinds": ["bar", "line"], "digits": [1, 3]}),
    ("needle", {}),
    ("needle", {"size": [192, 512], "cells": [6, 8]}),
    ("needle", {"size": [64, 64], "cells": [2, 1]}),
]


def objects(sample: Sample, **wanted: Any) -> list[dict[str, Any]]:
    """Objects of the scene whose facts agree."""
    found = sample.metadata["scene"]["objects"]
    return [item for item in found if all(item.get(key) == value for key, value in wanted.items())]


@pytest.mark.parametrize(("name", "options"), SCENES)
def test_ink_lies_in_the_boxes_and_nowhere_else(name: str, options: dict[str, Any]) -> None:
    source = open_generated(name, "train", options, seed=11)
    for i in range(40):
        sample = source[i]
        scene = sample.metadata["scene"]
        pixels = np.asarray(sample.images[0].source)  # (H, W, 3)
        assert pixels.shape == (scene["height"], scene["width"], 3)
        assert [scene["height"], scene["width"]] == list(source.generator.options.size)
        ink = (pixels != np.array(scene["background"])).any(axis=2)  # (H, W)
        covered = np.zeros_like(ink)
        for item in scene["objects"]:
            x0, y0, x1, y1 = item["box"]
            assert 0 <= x0 < x1 <= scene["width"], (sample.id, item)
            assert 0 <= y0 < y1 <= scene["height"], (sample.id, item)
            covered[y0:y1, x0:x1] = True
            inside = ink[y0:y1, x0:x1]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any(), (sample.id, item)
        assert not (ink & ~covered).any(), sample.id


@pytest.mark.parametrize(("name", "options"), SCENES)
def test_objects_that_are_asked_about_do_not_overlap(name: str, options: dict[str, Any]) -> None:
    kinds = {"text"} if name != "shapes" else {"circle", "square", "triangle"}
    source = open_generated(name, "test", {**options, "as_text": True}, seed=12)
    for i in range(60):
        boxes = [item["box"] for item in objects(source[i]) if item["kind"] in kinds and item.get("role") != "tick"]
        for k, a in enumerate(boxes):
            for b in boxes[:k]:
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                assert apart, (source[i].id, a, b)


def test_coloured_ink_has_the_named_colour() -> None:
    source = open_generated("characters", "train", {"tasks": {"colour": 1}, "fonts": ["sans-bold"]}, seed=0)
    for i in range(40):
        sample = source[i]
        (item,) = objects(sample, kind="text")
        pixels = np.asarray(sample.images[0].source).reshape(-1, 3)
        assert item["colour"] == sample.answer
        assert (pixels == np.array(item["rgb"])).all(axis=1).any()


def test_answers_of_characters() -> None:
    source = open_generated("characters", "test", {**LINES, "as_text": True, "digits": [1, 3]}, seed=8)
    for i in range(400):
        sample = source[i]
        question = sample.question.removeprefix(sample.metadata["transcript"] + "; ")
        items = objects(sample, kind="text")
        strings = [item["string"] for item in items]
        assert len(set(strings)) == len(strings)
        words = question.rstrip("?").split()
        if sample.category in ("read_number", "read_text"):
            found = [item for item in items if item["what"] == words[-1]]
            if len(words) == 2:
                found = [item for item in found if item["colour"] == words[0]]
            assert [item["string"] for item in found] == [sample.answer]
        elif sample.category == "read_kth":
            (item,) = objects(sample, line=int(words[1]), position=int(words[3]))
            assert item["string"] == sample.answer
        elif sample.category == "count":
            assert sum(item["what"] == words[2].rstrip("s") for item in items) == int(sample.answer)
        elif sample.category == "colour":
            (item,) = items if len(words) == 1 else objects(sample, string=words[-1])
            assert item["colour"] == sample.answer
        elif sample.category == "compare":
            values = sorted(map(int, strings))
            assert values[0] < values[1]
            assert int(sample.answer) == values[1 if words[0] == "larger" else 0]
        else:
            (item,) = items if len(words) == 1 else objects(sample, string=words[-1])
            assert _quarter(item["box"], 96, 160) == sample.answer


def _quarter(box: list[int], height: int, width: int) -> str:
    """The quarter that holds the whole box."""
    assert box[3] <= height // 2 or box[1] >= height // 2
    assert box[2] <= width // 2 or box[0] >= width // 2
    return f"{'top' if box[3] <= height // 2 else 'bottom'} {'left' if box[2] <= width // 2 else 'right'}"


def test_single_items_ask_for_their_characters() -> None:
    source = open_generated("characters", "train", {"tasks": {"read_kth": 1, "count": 1, "locate": 1}}, seed=8)
    for i in range(200):
        sample = source[i]
        (item,) = objects(sample, kind="text")
        if sample.category == "count":
            assert sample.answer == str(len(item["string"]))
        elif sample.category == "read_kth":
            assert sample.answer == item["string"][int(sample.question.rstrip("?").split()[1]) - 1]
        else:
            assert sample.answer == ("left" if item["box"][2] <= 32 else "right")


def test_answers_of_shapes() -> None:
    source = open_generated("shapes", "train", {"as_text": True}, seed=8)
    for i in range(300):
        sample = source[i]
        question = sample.question.removeprefix(sample.metadata["transcript"] + "; ").rstrip("?")
        items = objects(sample)
        if sample.category == "count":
            what = question.removeprefix("how many").strip().removesuffix(" shapes")
            found = [item for item in items if what in ("", item["colour"], item["kind"] + "s")]
            assert len(found) == int(sample.answer)
        elif sample.category == "colour":
            found = items if question == "colour" else objects(sample, kind=question.split()[-1])
            assert [item["colour"] for item in found] == [sample.answer]
        elif sample.category == "compare":
            ranked = sorted(items, key=lambda item: item["box"][2] - item["box"][0], reverse=question == "largest")
            assert f"{ranked[0]['colour']} {ranked[0]['kind']}" == sample.answer
            # The largest is the largest by area too, although a triangle fills half of its box.
            areas = [
                item["size"] ** 2 * {"square": 1.0, "circle": 0.785, "triangle": 0.5}[item["kind"]] for item in ranked
            ]
            others = areas[1:]
            assert areas[0] > max(others) if question == "largest" else areas[0] < min(others)
        else:
            (item,) = objects(sample, colour=question.split()[-2], kind=question.split()[-1])
            assert _quarter(item["box"], 64, 64) == sample.answer


def test_answers_of_receipts() -> None:
    source = open_generated("receipts", "test", {"as_text": True}, seed=8)
    for i in range(200):
        sample = source[i]
        names = {item["line"]: item["string"] for item in objects(sample, role="name")}
        prices = {item["line"]: item["string"] for item in objects(sample, role="price")}
        cost = {names[line]: round(100 * float(prices[line])) for line in names}
        (total,) = objects(sample, role="total")
        assert sum(cost.values()) == round(100 * float(total["string"]))
        assert len(set(cost.values())) == len(cost) == len(names)
        question = sample.question.removeprefix(sample.metadata["transcript"] + "; ").rstrip("?")
        expected = {
            "shop": [item["string"] for item in objects(sample, role="shop")],
            "date": [item["string"] for item in objects(sample, role="date")],
            "total": [total["string"]],
            "how many items": [str(len(names))],
            "dearest": [max(cost, key=lambda name: cost[name])],
            "cheapest": [min(cost, key=lambda name: cost[name])],
        }
        word = question.split()[-1]
        if question.startswith("price of"):
            expected[question] = [price for line, price in prices.items() if names[line] == word]
        elif question.startswith("what costs"):
            expected[question] = [name for line, name in names.items() if prices[line] == word]
        elif question.startswith("item"):
            expected[question] = [names[sorted(names)[int(word) - 1]]]
        assert expected[question] == [sample.answer]


def test_answers_of_tables() -> None:
    source = open_generated("tables", "test", {"as_text": True}, seed=8)
    for i in range(200):
        sample = source[i]
        rows = {item["string"]: item["row"] for item in objects(sample, role="row title")}
        columns = {item["string"]: item["column"] for item in objects(sample, role="column title")}
        cells = {(item["row"], item["column"]): item["string"] for item in objects(sample, role="cell")}
        assert len(set(cells.values()) | set(rows) | set(columns)) == len(cells) + len(rows) + len(columns)
        asked = sample.question.removeprefix(sample.metadata["transcript"] + "; ").rstrip("?").split()
        first, last = asked[0], asked[-1]
        if sample.category in ("read_number", "read_text"):
            assert cells[rows[first], columns[last]] == sample.answer
            assert sample.answer.isdigit() == (sample.category == "read_number")
        elif sample.category == "read_kth":
            assert cells[int(last), columns[first]] == sample.answer
        elif sample.category == "compare":
            column = {title: int(cells[row, columns[last]]) for title, row in rows.items()}
            best = (max if first == "largest" else min)(column.values())
            assert [title for title, value in column.items() if value == best] == [sample.answer]
        elif sample.category == "count":
            assert int(sample.answer) == len(rows if last == "rows" else columns)
        else:
            ((row, column),) = (place for place, text in cells.items() if text == last)
            assert {**rows, **columns}[sample.answer] == (row if first == "row" else column)


def test_answers_of_charts() -> None:
    source = open_generated("charts", "test", {"as_text": True}, seed=8)
    seen = Counter()
    for i in range(200):
        sample = source[i]
        kind = sample.metadata["chart"]
        seen[kind] += 1
        parts = objects(sample, kind={"bar": "bar", "line": "point", "pie": "slice"}[kind])
        values = {item["name"]: item["value"] for item in parts}
        assert len(set(values.values())) == len(values) == len(parts)
        assert sorted(item["string"] for item in objects(sample, role="value")) == sorted(map(str, values.values()))
        if kind == "pie":
            assert sum(values.values()) == 100
        if kind == "bar":
            # One pixel of height is worth the same in every bar.
            heights = [item["box"][3] - item["box"][1] for item in parts]
            unit = sum(heights) / sum(values.values())
            assert all(abs(height - unit * item["value"]) < 1.5 for height, item in zip(heights, parts, strict=True))
        question = sample.question.removeprefix(sample.metadata["transcript"] + "; ").rstrip("?")
        name = question.split()[-1]
        if sample.category == "count":
            assert len(parts) == int(sample.answer)
        elif sample.category == "colour":
            colours = {item["colour"] for item in parts if kind == "line" or item["name"] == name}
            assert colours == {sample.answer}
        elif sample.category == "compare":
            assert sample.answer == (max if name == "largest" else min)(values, key=lambda key: values[key])
        else:
            assert str(values[name]) == sample.answer
    assert min(seen.values()) > 30


def test_charts_without_labels_can_be_read_from_the_axis() -> None:
    source = open_generated("charts", "train", {"value_labels": False, "kinds": ["bar"], "as_text": True}, seed=0)
    for i in range(30):
        sample = source[i]
        ticks = {int(item["string"]): item for item in objects(sample, role="tick")}
        assert sorted(ticks) == [0, 20, 40, 60, 80, 100]
        rules = sorted(item["box"][1] for item in objects(sample, kind="rule"))
        top, base = rules[0], rules[-1]
        for bar in objects(sample, kind="bar"):
            read = 100 * (bar["box"][3] - bar["box"][1]) / (base - top)
            assert read == pytest.approx(bar["value"], abs=100 / (base - top))
        assert not objects(sample, role="value")


def test_fonts_come_from_matplotlib_and_differ() -> None:
    assert set(FONT_FILES) == set(FontName.__args__)
    drawn = {name: letter("Rag47", name, 20) for name in FONT_FILES}
    images = {b"".join(mask.tobytes() for mask, _, _ in lettering.stamps) for lettering in drawn.values()}
    assert len(images) == len(FONT_FILES)


def test_glyphs_stand_on_one_baseline() -> None:
    low, high = letter("a", "sans", 20), letter("ag", "sans", 20)
    assert low.baseline == high.baseline
    assert high.height > low.height
    assert letter("bd", "sans", 20).baseline > low.baseline


def test_full_phrasing_paraphrases_and_keeps_the_fields_of_the_short_form() -> None:
    for form, (short, full) in PHRASES.items():
        assert len(full) >= 2, form
        assert len(set(full)) == len(full), form
        named = ("{string}", "{name}", "{colour}", "{column}", "{row}", "{price}", "{value}")
        for sentence in full:
            assert [field in short for field in named] == [field in sentence for field in named], form


def test_options_are_read_without_torch_or_images() -> None:
    code = (
        "import sys; from unclipped.data.generated.options import parse_options; parse_options('charts', {}); "
        "print([m for m in ('torch', 'PIL', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_drawing_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from unclipped.data.generated.registry import open_generated; "
        "open_generated('charts', 'train')[0]; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_needle_is_the_only_number_and_stands_where_its_category_says() -> None:
    source = open_generated("needle", "test", {"cells": [9, 6]}, seed=3)
    seen = set()
    for i in range(60):
        sample = source[i]
        (needle,) = objects(sample, what="number")
        assert needle["string"] == sample.answer
        assert len(objects(sample, what="word")) == 9 * 6 - 1
        vertical, horizontal = str(sample.category).split()
        assert (needle["row"] - 1) // 3 == ["top", "middle", "bottom"].index(vertical)
        assert (needle["column"] - 1) // 2 == ["left", "middle", "right"].index(horizontal)
        seen.add((needle["row"], needle["column"]))
    assert len(seen) > 20
