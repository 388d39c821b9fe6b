"""Measured results: one screen, a page and a JSON file for each topic, and figures that agree among the three."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from docs_pages import ROOT

SCREEN = ROOT / "benchmarks" / "RESULTS.md"
FOLDER = SCREEN.parent / "results"
TOPICS = sorted(FOLDER.glob("*.md"))
HEADER = ("Machine", "Date", "Versions", "Command", "Seed")
FIGURE_FIELDS = {"claim", "value", "low", "high", "unit", "against", "command", "machine", "date"}
NUMBER = r"[+-]?\d+(?:\.\d+)?"
FIGURE = re.compile(rf"({NUMBER})(?: ?%| s| points)?(?:\*\*)? \[({NUMBER}), ({NUMBER})\]")


def plain(text: str) -> str:
    """Numbers as JSON writes them: an ASCII minus, no plus, no comma between thousands."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("−", "-")).replace("+", "")


def figures(topic: Path) -> list[dict[str, Any]]:
    """The figures of a topic, numbers as the digits in the file, so that 1.20 stays 1.20."""
    return json.loads(topic.with_suffix(".json").read_text(), parse_float=str, parse_int=str)["figures"]


def claim_rows() -> list[str]:
    lines = [line for line in SCREEN.read_text().splitlines() if line.startswith("| ")]
    assert lines[0] == "| claim | figure [95 %] | against | machine, date | page |"
    return lines[1:]


def linked_pages(text: str) -> list[str]:
    return re.findall(r"\]\(results/([\w-]+\.md)\)", text)


def test_the_first_screen_is_one_screen_and_leads_to_every_page() -> None:
    text = SCREEN.read_text()
    assert len(text.splitlines()) <= 60
    assert set(linked_pages(text)) == {page.name for page in TOPICS}
    assert "Not measured" in text


def test_every_topic_has_a_page_and_a_json_file() -> None:
    assert TOPICS
    assert {page.stem for page in TOPICS} == {path.stem for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("row", claim_rows(), ids=lambda row: row.split("|")[1].strip()[:40])
def test_claims_have_a_page_whose_json_holds_their_figures(row: str) -> None:
    (name,) = linked_pages(row)
    found = {(figure["value"], figure["low"], figure["high"]) for figure in figures(FOLDER / name)}
    shown = FIGURE.findall(plain(row))
    assert shown, "a row without a figure"
    for figure in shown:
        assert figure in found, f"{name}: no figure {figure}"


@pytest.mark.parametrize("page", TOPICS, ids=lambda page: page.stem)
def test_pages_are_short_and_open_with_the_header(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(lines) <= 80
    assert lines[0].startswith("# ")
    for line, field in zip(lines[2:], HEADER, strict=False):
        assert re.fullmatch(rf"- \*\*{field}:\*\* \S.*", line), f"{page.name}: {field} is missing"


@pytest.mark.parametrize("page", TOPICS, ids=lambda page: page.stem)
def test_figures_of_the_json_file_are_those_of_the_page(page: Path) -> None:
    text = plain(page.read_text())
    shown = set(FIGURE.findall(text))
    numbers = set(re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?(?![\d.]*\d)", text))
    listed = figures(page)
    assert listed
    for figure in listed:
        assert set(figure) == FIGURE_FIELDS, figure["claim"]
        assert all(figure[field] for field in FIGURE_FIELDS - {"low", "high"}), figure["claim"]
        if figure["low"] is None:
            assert figure["high"] is None, figure
            assert figure["value"] in numbers, figure
        else:
            assert (figure["value"], figure["low"], figure["high"]) in shown, figure


@pytest.mark.parametrize("page", [SCREEN, *TOPICS], ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
        assert (page.parent / target).is_file(), f"{page.name}: no file {target}"
