"""Paired comparisons of runs as tables on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed

from unclipped.evaluation.figures import Difference, Figure
from unclipped.evaluation.intervals import FEW_CLUSTERS
from unclipped.evaluation.paired import PairedResult, TaskComparison
from unclipped.evaluation.results import UNCATEGORISED
from unclipped.studies.page import Cell, Section, Table, Text, write_page
from unclipped.studies.plots import both, difference_plot
from unclipped.studies.reading import listed

OVERALL = "overall"


def print_comparison(console: Console, result: PairedResult) -> None:
    """A table a task, a line for each run in each category and over all items; under it what the table does not say."""
    for name, task in result.tasks.items():
        console.print(comparison_table(name, task, result.config.reference))
        for line in remarks(task):
            console.print(line, markup=False, highlight=False)
    for line in _not_common(result):
        console.print(line, markup=False, highlight=False)


def comparison_table(name: str, task: TaskComparison, reference: str) -> Printed:
    """Scores of all runs and paired differences from the reference, categories first."""
    table = Printed(title=escape(_title(name, task)), title_justify="left")
    table.add_column("category", overflow="fold")
    table.add_column("items", justify="right")
    table.add_column("run", overflow="fold")
    table.add_column(f"{task.metric.title} {_coverage(task)}", justify="right", no_wrap=True)
    table.add_column(f"minus {escape(reference)}{_unit(task)} {_coverage(task)}", justify="right", no_wrap=True)
    table.add_column("shown", no_wrap=True)
    for category, scores, differences in _rows(task):
        table.add_section()
        for place, (run, score) in enumerate(scores.items()):
            head = (escape(category), f"{score.count:,}") if place == 0 else ("", "")
            row = differences.get(run)
            shown = ("reference", "") if row is None else (str(row), task.verdict(row))
            table.add_row(*head, escape(run), str(score), *shown)
    return table


def _rows(task: TaskComparison) -> Iterator[tuple[str, dict[str, Figure], dict[str, Difference]]]:
    """(category, score of each run, difference of each other run), the whole last; no categories where there is one."""
    first = next(iter(task.results.values()))
    for category in first.categories if set(first.categories) != {UNCATEGORISED} else ():
        yield (
            category,
            {run: result.categories[category] for run, result in task.results.items()},
            {run: found.categories[category] for run, found in task.differences.items()},
        )
    yield (
        OVERALL,
        {run: result.overall for run, result in task.results.items()},
        {run: found.overall for run, found in task.differences.items()},
    )


def remarks(task: TaskComparison) -> list[str]:
    """What a table does not say: items left out, answers that could not be read, settings that differ."""
    lines = []
    if task.left_out:
        counts = ", ".join(f"{count:,} of {run}" for run, count in task.left_out.items())
        lines.append(f"items that not all runs have were left out: {counts}")
    unread = {run: result.num_unparsed for run, result in task.results.items() if result.num_unparsed}
    if unread:
        counts = ", ".join(f"{count:,} of {run}" for run, count in unread.items())
        lines.append(f"answers that could not be read count as wrong: {counts}")
    return [*lines, *task.notes]


def readings(task: TaskComparison) -> list[str]:
    """One sentence a run: what the paired difference over all items shows."""
    lines = []
    for run, found in task.differences.items():
        row, shown = found.overall, task.verdict(found.overall)
        size = f"{row}{task.metric.points and f' {task.metric.points}'}"
        if shown in ("better", "worse"):
            lines.append(f"{run} is {shown}: {size}.")
        elif shown == "not shown":
            lines.append(f"{run}: no difference is shown: {size}.")
        else:
            lines.append(f"{run}: {row.clusters:,} independent items are too few to show a difference: {size}.")
    return lines


def limits(result: PairedResult) -> str:
    """What the comparison can and cannot show."""
    intervals = sum(1 for task in result.tasks.values() for *_, differences in _rows(task) for _ in differences)
    text = (
        "A run is better or worse where the interval of its paired difference leaves out zero and at least "
        f"{FEW_CLUSTERS} independent items were drawn. Intervals hold the chance of the items, not that of another "
        "training."
    )
    share = max(1.0 - task.config.confidence for task in result.tasks.values())
    if intervals > 1:
        text += (
            f" If the runs were equal, about {100 * share:g} % of the {intervals:,} differences would leave out zero "
            "by chance."
        )
    return text


def write_comparison_of_runs(path: Path, result: PairedResult, environment: Mapping[str, Any]) -> Path:
    """Write the page and return its path. Raises UnclippedError when it cannot be written."""
    reference = result.config.reference
    lead = f"{_listed([*result.config.runs], reference)}, on the same items."
    sections = [part for name, task in result.tasks.items() for part in _sections(name, task, reference)]
    if others := _not_common(result):
        sections.append(Section("Not compared", [Text("; ".join(others))]))
    sections.append(Section("How to read this", [Text(limits(result))]))
    return write_page(path, "Runs compared", lead, sections, environment=environment)


def _sections(name: str, task: TaskComparison, reference: str) -> list[Section]:
    """Differences with their plot, then scores."""
    drawn: dict[str, dict[str, Difference]] = {run: {} for run in task.differences}
    scores: list[list[Cell]] = []
    differences: list[list[Cell]] = []
    for category, found, minus in _rows(task):
        head = [category, f"{found[reference].count:,}"]
        scores.append([*head, *map(str, found.values())])
        differences.append([*head, *(_shown(task, row) for row in minus.values())])
        for run, row in minus.items():
            drawn[run][category] = row
    axis = f"minus {reference}: {task.metric.title}{_unit(task)}"
    noted = [f"Noted: {'; '.join(remarks(task))}."] if remarks(task) else []
    columns = [f"{run} minus {reference}{_unit(task)} {_coverage(task)}" for run in drawn]
    figures = ["category", "items", *(f"{run} {_coverage(task)}" for run in task.results)]
    return [
        Section(
            _title(name, task),
            [
                Text(" ".join([*readings(task), *noted])),
                both(difference_plot, name, drawn, axis),
                Table(["category", "items", *columns], differences),
            ],
        ),
        Section(f"{name}: {task.metric.title}", [Table(figures, scores)]),
    ]


def _shown(task: TaskComparison, row: Difference) -> str:
    """A difference with what it shows, where it shows something or is of too few items to."""
    verdict = task.verdict(row)
    return str(row) if verdict == "not shown" else f"{row} {verdict}"


def _not_common(result: PairedResult) -> list[str]:
    return [f"task {task} is not in every run ({', '.join(runs)})" for task, runs in result.not_common.items()]


def _listed(runs: list[str], reference: str) -> str:
    return f"{listed([run for run in runs if run != reference])} against {reference}"


def _title(name: str, task: TaskComparison) -> str:
    first = next(iter(task.results.values()))
    return f"{name}: {first.scorer}, {task.metric.direction}"


def _coverage(task: TaskComparison) -> str:
    return f"[{100 * task.config.confidence:g}\N{NO-BREAK SPACE}%]"


def _unit(task: TaskComparison) -> str:
    return f" ({task.metric.points})" if task.metric.points else ""
