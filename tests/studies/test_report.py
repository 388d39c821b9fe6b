"""The report: self-contained, complete, escaped, honest about overlapping intervals."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from unclipped.core.errors import ImageError
from unclipped.evaluation.figures import ACCURACY, Difference, Figure, metric_called
from unclipped.studies.page import GalleryItem, clock
from unclipped.studies.plots import joined_curve, smoothed
from unclipped.studies.reading import compare_arms, read_figures
from unclipped.studies.report import PartInfo, ReportData, StageInfo, render_report, write_report

CATEGORIES = ("read_number", "read_text", "read_kth", "count", "colour", "compare", "locate")


def row(value: float, count: int = 400, metric: str = "accuracy") -> Figure:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.0004) / count)
    return Figure(value, max(0.0, value - half), min(1.0, value + half), count, metric_called(metric))


def picture(text: str, size: tuple[int, int] = (64, 24)) -> Image.Image:
    image = Image.new("RGB", size, (245, 240, 225))
    ImageDraw.Draw(image).text((6, 6), text, fill=(150, 30, 60))
    return image


def curve(start: float, end: float) -> list[dict]:
    chooser, rows = random.Random(0), []
    for stage, (first, last) in (("numbers", (0, 500)), ("words", (500, 1400)), ("all", (1400, 2400))):
        for step in range(10, last - first + 1, 10):
            done = (first + step) / 2400
            loss = start * (end / start) ** done * chooser.uniform(0.85, 1.15)
            rows.append({"stage": stage, "step": step, "loss": loss})
    return rows


@pytest.fixture
def report_data() -> ReportData:
    figures = {
        "model": (0.978, 0.913, 0.71, 0.66, 0.995, 0.62, 0.58),
        "blind": (0.012, 0.0, 0.03, 0.21, 0.17, 0.51, 0.24),
        "random_encoder": (0.982, 0.884, 0.69, 0.6, 0.99, 0.6, 0.55),
    }
    arms = {
        arm: {name: row(value) for name, value in zip(CATEGORIES, values, strict=True)}
        for arm, values in figures.items()
    }
    gallery = [
        GalleryItem(
            picture(str(10 + 7 * number)) if number % 5 else picture("TOTAL 12.50", (400, 100)),
            "what number is written here?" if number % 3 else "which word stands third on the second line?",
            str(10 + 7 * number),
            str(10 + 7 * number + (number % 4 == 3)),
            number % 4 != 3,
            CATEGORIES[number % 7],
        )
        for number in range(24)
    ]
    parts = [PartInfo("vision", 412_160, 412_160, 0.01), PartInfo("connector", 33_024, 33_024, 0.001)]
    return ReportData(
        title="Quickstart: a small model that reads",
        description="A vision encoder made from a text-only language model, trained on generated images.",
        arms=arms,
        overall={arm: row(sum(values) / 7, 2800) for arm, values in figures.items()},
        differences={
            "blind": {
                name: Difference(a - b, a - b - 0.04, a - b + 0.04, 400, 400, ACCURACY)
                for name, a, b in zip(CATEGORIES, figures["model"], figures["blind"], strict=True)
            }
        },
        groups={
            "held_out": {name: row(0.8, 200) for name in CATEGORIES[:2]},
            "not_held_out": {name: row(0.9, 200) for name in CATEGORIES[:3]},
        },
        difficulty="Images of 24 × 64 px, one clean font, six colours. Test words never occur in training, nor does a "
        "fifth of the number values.",
        curves={"model": curve(4.2, 0.02), "blind": curve(4.0, 1.6), "random_encoder": curve(4.4, 0.025)},
        stages=[
            StageInfo("numbers", 500, [*parts, PartInfo("text", 446_000, 0)], 32, 43.2, 9.41, 9.41),
            StageInfo("words", 900, [*parts, PartInfo("text", 446_000, 446_000, 0.01)], 32, 81.0, 9.41, 10.02),
            StageInfo("all", 1000, [*parts, PartInfo("text", 446_000, 446_000, 0.01)], 32, 92.7, 10.02, 10.4),
        ],
        gallery=gallery,
        times={"tokenizer and language model": 12.4, "training": 217.0, "evaluation": 41.0, "in all": 612.0},
        costs={"peak memory": "1.1 GiB", "FLOPs": "3.1e13", "device-hours": "0.17"},
        environment={
            "date": "2026-11-22T10:00:00+00:00",
            "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 23.5, "gpu": []},
            "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
            "git": None,
        },
        recipe="model:\n  vision: llm:lm\n  note: <b>&amp;</b>\n",
        notes=["The encoder made from the language model shows no gain over a random start at this size."],
        next_commands=[
            ("Ask about a test image:", 'unclipped chat quickstart/model quickstart/sample.png -q "number?"'),
            ("Train the same recipe on your own folder:", "unclipped train quickstart data.sources.0.source=./my-data"),
        ],
    )


class Links(HTMLParser):
    """Collects what a browser would load, and checks that elements nest."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(report_data: ReportData, tmp_path: Path) -> None:
    text = write_report(tmp_path / "run" / "report.html", report_data).read_text(encoding="utf-8")
    page = Links()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.loaded
    assert all(target.startswith(("data:image/", "#")) for target in page.loaded)
    assert not re.search(r"url\((?!#|\")", text.replace("url(&quot;#", "url(#"))
    assert "@import" not in text
    assert len(text) < 2_000_000


def test_ids_of_the_plots_are_unique(report_data: ReportData) -> None:
    ids = re.findall(r'\bid="([^"]+)"', render_report(report_data))
    assert ids
    assert len(ids) == len(set(ids))


def test_page_holds_everything(report_data: ReportData) -> None:
    text = render_report(report_data)
    for expected in (
        report_data.title, report_data.difficulty, "97.8\N{NO-BREAK SPACE}%",
        "random encoder", "read_kth", "18 of these 24 answers",
        "412,160", "frozen", "9.41 → 10.02", "1.1 GiB", "torch 2.13.0+cpu", "3 min 37 s", "not held out", "AMD EPYC",
        "unclipped chat quickstart/model", "+96.6", "no gain over a random start",
    ):  # fmt: skip
        assert expected in text, expected
    assert "&lt;b&gt;&amp;amp;" in text  # the recipe is text, not markup
    assert text.count("✓") == 18
    assert text.count("✗") == 6
    assert "#0a000" not in text  # every stand-in colour became a variable of the page


def test_same_data_same_page(report_data: ReportData) -> None:
    assert render_report(report_data) == render_report(report_data)


def test_question_text_is_escaped(report_data: ReportData) -> None:
    item = GalleryItem(picture("1"), "<script>alert(1)</script>", "a", "<img src=x>", False)
    text = render_report(ReportData(title="<i>", arms=report_data.arms, gallery=[item]))
    assert "<script>" not in text
    assert "<img src=x>" not in text
    assert "<title>&lt;i&gt;</title>" in text


def test_a_report_of_little(tmp_path: Path) -> None:
    text = render_report(ReportData(title="Empty", arms={}))
    assert "No figures" in text
    assert "<figure>" not in text
    text = render_report(ReportData(title="One", arms={"model": {"lines": row(0.03, 900, "character_error_rate")}}))
    assert "0.030" in text
    assert "character error rate" in text


def test_gallery_image_from_a_file_and_an_unreadable_one(tmp_path: Path, report_data: ReportData) -> None:
    picture("7", (900, 600)).save(tmp_path / "large.png")
    item = GalleryItem(tmp_path / "large.png", "?", "7", "7", True)
    text = render_report(ReportData(title="t", arms=report_data.arms, gallery=[item]))
    assert 'width="480" height="320"' in text
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        render_report(ReportData(title="t", arms={}, gallery=[GalleryItem(tmp_path / "bad.png", "?", "7", "7", True)]))


def test_reading_calls_a_lead_only_what_disjoint_intervals_show(report_data: ReportData) -> None:
    text = read_figures(report_data.arms, {})
    assert "2,800 test questions in 7 categories" in text
    assert "Against blind (trained without images) it is better in" in text
    assert "Against random encoder (trained alike) no category shows a lead" in text
    sides = compare_arms(report_data.arms["model"], report_data.arms["blind"])
    assert "read_number" in sides["above"]
    lower = {
        "model": {"a": row(0.1, 400, "character_error_rate")},
        "blind": {"a": row(0.9, 400, "character_error_rate")},
    }
    assert compare_arms(lower["model"], lower["blind"]) == {"above": ["a"], "below": [], "open": []}
    assert "worse than that arm in a" in read_figures({"model": lower["blind"], "blind": lower["model"]}, {})


def test_curves_of_stages_are_joined() -> None:
    rows = [
        {"stage": "a", "step": 10, "loss": 2.0},
        {"stage": "a", "step": 20, "loss": 1.5},
        {"stage": "a", "step": 20},
    ]
    rows += [{"stage": "b", "step": 10, "loss": 1.0}, {"stage": "b", "step": 30, "loss": 0.5}]
    assert joined_curve(rows) == ([10, 20, 30, 50], [2.0, 1.5, 1.0, 0.5], [("a", 0, 20), ("b", 20, 50)])


def test_a_stage_whose_first_logged_step_is_late_begins_where_the_one_before_ended() -> None:
    steps = {"short": (2,), "long": (50, 100, 120), "longer": (150, 160)}
    rows = [{"stage": name, "step": step, "loss": 1.0} for name, logged in steps.items() for step in logged]
    joined, _, stages = joined_curve(rows)
    assert joined == [2, 52, 102, 122, 272, 282]
    assert stages == [("short", 0, 2), ("long", 2, 122), ("longer", 122, 282)]


@given(st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=5, unique=True).map(sorted), max_size=5))
def test_stages_are_drawn_one_after_another(logged: list[list[int]]) -> None:
    """Whatever steps are logged, and where two stages have one name: neither overlap nor gap."""
    rows = [
        {"stage_index": index, "stage": "same", "step": step, "loss": float(step)}
        for index, steps in enumerate(logged)
        for step in steps
    ]
    joined, values, stages = joined_curve(rows)
    before = [sum(steps[-1] for steps in logged[:index]) for index in range(len(logged))]
    assert joined == [start + step for start, steps in zip(before, logged, strict=True) for step in steps]
    assert values == [row["loss"] for row in rows]
    assert stages == [("same", start, start + steps[-1]) for start, steps in zip(before, logged, strict=True)]


def test_smoothing_of_a_constant_is_the_constant() -> None:
    assert smoothed([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    assert smoothed([], 4) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (44.6, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (59.7, "1 min 0 s")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_dollar_in_a_category_is_a_dollar() -> None:
    from unclipped.evaluation.figures import Figure
    from unclipped.studies.plots import forest_plot

    one = Figure(0.5, 0.4, 0.6, 10)
    drawn = forest_plot("cost $5 and $x_{", {"$\\frac{": one, "all": one}, narrow=False)
    assert "$\\frac{" in drawn
