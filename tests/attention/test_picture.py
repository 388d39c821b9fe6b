from __future__ import annotations

from pathlib import Path

import pytest

from unclipped.attention.patterns import PATTERNS
from unclipped.attention.picture import INK, SHOWN, draw_patterns
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError


def test_panels_show_what_the_pattern_allows(tmp_path: Path) -> None:
    draw_patterns(["window2d(1, 1)", "full"], tmp_path / "patterns.svg", rows=4, columns=4, place=(2, 1))
    text = (tmp_path / "patterns.svg").read_text()
    assert text.count("#2c6fad") == 3 + 1 + (4 + 9)  # row above and the left; all text and earlier tokens
    assert text.count("#c0392b") == 2


def test_dynamic_patterns_have_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no fixed picture"):
        draw_patterns(["topk(2)"], tmp_path / "patterns.svg")


def test_tiles_in_a_panel(tmp_path: Path) -> None:
    draw_patterns(["tiles(2, 3)"], tmp_path / "patterns.svg", rows=4, columns=4, place=(3, 1))
    text = (tmp_path / "patterns.svg").read_text()
    assert text.count(INK["key"]) == 3 + 1  # the tile's upper row, and the left of it in its own


def test_the_picture_of_the_page_shows_the_patterns_that_it_names() -> None:
    """All that have a fixed meaning on one page, and as many panels as the page says."""
    page = (Path(__file__).parents[2] / "docs" / "sparse-prefill.md").read_text()
    words = {8: "Eight", 9: "Nine", 10: "Ten"}
    assert f"![{words[len(SHOWN)]} panels of" in page
    drawn = {part.name for text in SHOWN for part in parse_pattern(text).walk()}
    shown_elsewhere = {
        "window3d",
        "same_image",
        "full",
        "per_head",
        "per_layer",
        "topk",
        "mass",
        "vertical_slash",
        "random",
    }
    assert set(filter(None, PATTERNS)) - drawn - shown_elsewhere == set()
