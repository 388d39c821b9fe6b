"""Paired comparisons of runs as tables and as a page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from support.kept_runs import items, keep
from unclipped.evaluation.figures import ACCURACY, Difference
from unclipped.evaluation.paired import PairedConfig, PairedResult, compare_runs
from unclipped.studies.paired_report import limits, print_comparison, readings, write_comparison_of_runs
from unclipped.studies.plots import difference_plot

ENVIRONMENT = {"platform": "a machine"}


def compared(folder: Path, **fields: Any) -> PairedResult:
    """Of 40 items in two categories `base` has 20 right, `<b>` 30 and `[c]` 20."""
    right = {"base": 20, "<b>": 30, "[c]": 20}
    runs = {}
    for number, (name, count) in enumerate(right.items()):
        rows = items(
            40,
            prediction=lambda i, count=count: str(i % 7) if i < count else "none",
            category=lambda i: "low" if i < 10 else "high",
        )
        more = {"only": rows} if name == "base" else {}
        runs[name] = str(keep(folder / str(number), {"t": rows, **more}, **fields))
    return compare_runs(PairedConfig(runs=runs, reference="base"), console=Console(file=io.StringIO(), width=120))


def printed(result: PairedResult) -> str:
    out = io.StringIO()
    print_comparison(Console(file=out, width=120), result)
    return out.getvalue().replace("\N{NO-BREAK SPACE}", " ")


def test_table_has_scores_in_percent_and_differences_in_points(tmp_path: Path) -> None:
    text = printed(compared(tmp_path))
    lines = [re.sub(r"\s*[│┃]\s*", "|", line).strip("|") for line in text.splitlines()]
    assert "t: exact_match, higher is better" in text
    assert "category|items|run|accuracy [95 %]|minus base (points) [95 %]|shown" in lines
    overall = next(
        place for place, line in enumerate(lines) if re.match(r"overall\|40\|base\|50.0 % \[3\d\.\d, 6\d\.\d\]", line)
    )
    assert re.match(r"<b>\|75.0 % \[.*\]\|\+25.0 \[\+1\d\.\d, \+\d\d\.\d\]\|better", lines[overall + 1])
    assert re.match(r"\[c\]\|50.0 % \[.*\]\|\+0.0 \[\+0.0, \+0.0\]\|not shown", lines[overall + 2])
    low = next(place for place, line in enumerate(lines) if line.startswith("low|10|base|100.0 %"))
    assert lines[low + 1].endswith("too few")
    assert "task only is not in every run (base)" in text


def test_a_figure_that_is_no_share_has_three_decimals(tmp_path: Path) -> None:
    text = printed(compared(tmp_path, scorer="character_error_rate"))
    assert "lower is better" in text
    assert "points" not in text
    assert re.search(
        r"<b> .* −1\.000 \[−1\.\d{3}, −0\.\d{3}\] .* better", text
    )  # four edits an item, a quarter of them


def test_what_the_table_does_not_say_stands_under_it(tmp_path: Path) -> None:
    rows = items(40, choices=lambda i: tuple("0123456"))
    one = keep(tmp_path / "a", {"t": rows}, scorer="multiple_choice", max_new_tokens=4)
    silent = items(42, choices=lambda i: tuple("0123456"), prediction=lambda i: "" if i < 3 else str(i % 7))
    other = keep(tmp_path / "b", {"t": silent}, scorer="multiple_choice", max_new_tokens=8)
    config = PairedConfig(runs={"a": str(one), "b": str(other)}, reference="a", common=True)
    text = printed(compare_runs(config, console=Console(file=io.StringIO(), width=120)))
    assert "items that not all runs have were left out: 0 of a, 2 of b" in text
    assert "answers that could not be read count as wrong: 3 of b" in text
    assert "max_new_tokens: a 4, b 8" in text


def test_sentences_say_what_is_shown_and_what_is_not(tmp_path: Path) -> None:
    result = compared(tmp_path)
    task = result.tasks["t"]
    assert [line.partition(":")[0] for line in readings(task)] == ["<b> is better", "[c]"]
    assert "no difference is shown: +0.0 [+0.0, +0.0] points" in readings(task)[1]
    few = compared(tmp_path / "few").tasks["t"]
    object.__setattr__(few.differences["<b>"].overall, "clusters", 7)
    assert "7 independent items are too few to show a difference" in readings(few)[0]
    assert "about 5 % of the 6 differences would leave out zero by chance" in limits(result)


def test_page_is_whole_and_closed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("reference: base\n")
    path = write_comparison_of_runs(tmp_path / "report.html", compared(tmp_path / "runs"), ENVIRONMENT)
    text = path.read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "&lt;b&gt; and [c] against base, on the same items." in text
    assert text.count("<svg") == 2  # wide and narrow
    assert "<b>" not in text
    assert "a machine" in text
    assert "reference: base" in text
    assert "task only is not in every run (base)" in text
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert any(re.fullmatch(r"\+25\.0 \[\+1\d\.\d, \+\d\d\.\d\] better", cell) for cell in cells)
    assert "+0.0 [+0.0, +0.0]" in cells
    assert any(cell.startswith("75.0 % [") for cell in cells)
    assert not re.search(r"""(?:src|href)="(?!#)""", text)


@pytest.mark.parametrize("narrow", [False, True])
def test_plot_puts_marks_where_the_differences_are(narrow: bool) -> None:
    first, second = ((0.1, 0.0, 0.2), (-0.2, -0.4, 0.0))
    rows = {name: Difference(*row, 40, 40, ACCURACY) for name, row in {"first": first, "second": second}.items()}
    one = difference_plot("t", {"x & y": rows}, "points", narrow=narrow)
    both = difference_plot("t", {"x": rows, "z": {"second": rows["first"]}}, "points", narrow=narrow)
    assert 'aria-label="t: points with intervals, for x &amp; y; the table has the same"' in one
    for text in ("first", "second", "20"):
        assert f">{text}<" in one
    assert ">z<" in both  # several runs have a legend
    assert ">x &amp; y<" not in one
    marks = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"[^>]*style="fill: var\(--arm-0\)', one)]
    zero = _x_of_zero(one)
    assert len(marks) == 2
    assert (zero - marks[1]) / (marks[0] - zero) == pytest.approx(2.0, rel=1e-3)


def _x_of_zero(picture: str) -> float:
    """Where the line of ink stands that runs from bottom to top."""
    path = next(path for path in re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--ink\)', picture))
    first, second = re.findall(r"[ML] ([\d.]+) [\d.]+", path)
    assert first == second
    return float(first)
