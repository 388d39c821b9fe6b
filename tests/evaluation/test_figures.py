"""Figures: one text form by metric, one JSON form that reads back, leads by direction."""

from __future__ import annotations

import pytest

from unclipped.evaluation.figures import ACCURACY, CHARACTER_ERROR_RATE, KL, Difference, Figure, Metric, is_figure

SPACE = "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("metric", "text", "difference"),
    [
        (ACCURACY, f"89.7{SPACE}% [88.3, 91.0]", "−2.4 [−3.0, +0.1]"),
        (CHARACTER_ERROR_RATE, "0.897 [0.883, 0.910]", "−0.024 [−0.030, +0.001]"),
        (KL, "0.8970 [0.8830, 0.9100]", "−0.0240 [−0.0300, +0.0010]"),
    ],
)
def test_the_metric_gives_unit_and_decimals(metric: Metric, text: str, difference: str) -> None:
    assert str(Figure(0.897, 0.883, 0.91, 100, metric)) == text
    assert str(Difference(-0.024, -0.03, 0.001, 100, 40, metric)) == difference


@pytest.mark.parametrize("metric", [ACCURACY, CHARACTER_ERROR_RATE, Metric("unheard_of")])
def test_json_form_reads_back(metric: Metric) -> None:
    figure = Figure(0.5, 0.4, 0.6, 30, metric, 10, "bootstrap")
    found = figure.to_dict()
    assert found == {metric.name: 0.5, "low": 0.4, "high": 0.6, "count": 30, "clusters": 10, "method": "bootstrap"}
    assert Figure.read(found) == Figure(0.5, 0.4, 0.6, 30, metric)
    assert Figure.read(figure.row()).row() == figure.row()
    assert is_figure(found, metric.name)
    assert not is_figure(found, "other")
    difference = Difference(0.1, 0.0, 0.2, 30, 10, metric)
    assert Difference.read(difference.to_dict(), metric) == difference


def test_a_row_of_two_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one value .* found \['accuracy', 'anls'\]"):
        Figure.read({"accuracy": 1.0, "anls": 1.0, "low": 1.0, "high": 1.0, "count": 1})


def test_a_lead_is_a_disjoint_interval_in_the_direction_of_the_metric() -> None:
    for metric, first_leads in ((ACCURACY, True), (CHARACTER_ERROR_RATE, False)):
        high, low = Figure(0.9, 0.8, 1.0, 10, metric), Figure(0.1, 0.0, 0.2, 10, metric)
        assert (high.leads(low), low.leads(high)) == (first_leads, not first_leads)
        overlapping = Figure(0.75, 0.7, 0.8, 10, metric)
        assert not high.leads(overlapping)
        assert not overlapping.leads(high)


def test_names_are_shown_as_they_are_written() -> None:
    """Neither markup nor control codes of a category reach the terminal."""
    import io

    from rich.console import Console

    from unclipped.evaluation.results import TaskResult
    from unclipped.evaluation.tables import result_table

    one = Figure(0.5, 0.4, 0.6, 10, ACCURACY)
    names = ["[/red]", "[bold]x[/bold]", "[a-z] letters", "\x1b[31mred\x07"]
    stream = io.StringIO()
    table = result_table(TaskResult("task", "exact_match", "kept", one, dict.fromkeys(names, one)))
    Console(file=stream, width=120).print(table)
    shown = stream.getvalue()
    for name in ("[/red]", "[bold]x[/bold]", "[a-z] letters", "[31mred"):
        assert name in shown, shown
    assert not set(shown) & {"\x1b", "\x07"}
