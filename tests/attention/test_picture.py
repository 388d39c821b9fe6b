from __future__ import annotations

from pathlib import Path

import pytest

from unclipped.attention.picture import draw_patterns
from unclipped.core.errors import UsageError


def test_panels_show_what_the_pattern_allows(tmp_path: Path) -> None:
    draw_patterns(["window2d(1, 1)", "full"], tmp_path / "patterns.svg", rows=4, columns=4, place=(2, 1))
    text = (tmp_path / "patterns.svg").read_text()
    assert text.count("#2c6fad") == 3 + 1 + (4 + 9)  # row above and the left; all text and earlier tokens
    assert text.count("#c0392b") == 2


def test_dynamic_patterns_have_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no fixed picture"):
        draw_patterns(["topk(2)"], tmp_path / "patterns.svg")
