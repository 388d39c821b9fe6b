"""Results of a task as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unclipped.evaluation.figures import Difference, Figure, shown
from unclipped.evaluation.results import UNCATEGORISED, Comparison, TaskResult


def result_table(result: TaskResult, blind: TaskResult | None = None, comparison: Comparison | None = None) -> Table:
    """One line a category, then groups and the whole, each with its interval."""
    metric = result.overall.metric
    title = f"{result.task}: {result.scorer}, {metric.direction}"
    if result.images != "kept":
        title += f", images {result.images}"
    table = Table(title=title, title_justify="left")
    table.add_column("category", overflow="fold")
    table.add_column("items", justify="right")
    table.add_column(metric.title, justify="right", no_wrap=True)
    if blind is not None:
        table.add_column("blind", justify="right", no_wrap=True)
        table.add_column(f"difference{metric.points and ' (points)'}", justify="right", no_wrap=True)

    def line(name: str, row: Figure, without: Figure | None, difference: Difference | None) -> None:
        extra = () if blind is None else (shown(without), shown(difference))
        words = Text("".join(character for character in name if character.isprintable()))  # no markup, no control codes
        table.add_row(words, f"{row.count:,}", str(row), *extra)

    categories = {} if set(result.categories) == {UNCATEGORISED} else result.categories
    for name, row in categories.items():
        without = None if blind is None else blind.categories.get(name)
        line(name, row, without, None if comparison is None else comparison.categories.get(name))
    table.add_section()
    for name, part in result.groups.items():
        group = None if blind is None else blind.groups.get(name)
        line(name.replace("_", " "), part.overall, None if group is None else group.overall, None)
    table.add_section()
    line(
        "overall", result.overall, None if blind is None else blind.overall, comparison.overall if comparison else None
    )
    return table


def print_result(
    console: Console, result: TaskResult, blind: TaskResult | None = None, comparison: Comparison | None = None
) -> None:
    """Print the table of a task, and what the table does not say: other scorers, answers that could not be read."""
    console.print(result_table(result, blind, comparison))
    for name, part in result.extra.items():
        console.print(f"{name}: {part.overall}", markup=False)
    if result.num_unparsed:
        console.print(
            f"{result.num_unparsed:,} of {result.overall.count:,} answers could not be read and count as wrong "
            f"({result.unparsed_share:.1%})",
            markup=False,
        )
    if result.num_unanswered:
        console.print(
            f"{result.num_unanswered:,} of {result.overall.count:,} items were not asked, because their prompts are "
            "longer than the model's positions; they count as wrong (predictions.jsonl says which)",
            markup=False,
        )
    if result.num_with_thinking:
        console.print(
            f"{result.num_with_thinking:,} of {result.overall.count:,} answers held thinking, which is not scored",
            markup=False,
        )
