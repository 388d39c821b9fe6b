"""Runs that answered the same items, compared in pairs: each against one reference, task by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from unclipped.core.config import FrozenConfig
from unclipped.core.errors import DataError, UsageError, nearest
from unclipped.core.progress import counting
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.figures import Difference, Metric
from unclipped.evaluation.intervals import FEW_CLUSTERS
from unclipped.evaluation.kept import KeptTask, read_task, task_folders
from unclipped.evaluation.predictions import Prediction
from unclipped.evaluation.results import Comparison, TaskResult, compare, summarise
from unclipped.evaluation.runner import default_console
from unclipped.evaluation.scorers import build_scorer

Verdict = Literal["better", "worse", "not shown", "too few"]

_SAME_ITEM = {"question": "question", "answers": "gold answer", "choices": "choices"}
"""Fields that make an item what it is, and their names."""
_NOT_ASKED = {"name", "scorer", "scorer_options", "extra_scorers", "unseen_answers_of"}
"""Task fields that change neither items nor answers."""


class PairedConfig(FrozenConfig):
    """Settings of `unclipped compare`."""

    runs: dict[str, str]
    """Folder of each run, by name."""
    reference: str
    """The run that the others are compared with."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; none named: all that every run has."""
    common: bool = False
    """Compare on the items that all runs have, where they differ."""


@dataclass(frozen=True)
class TaskComparison:
    """One task: the figures of each run, and each run minus the reference on the same items."""

    results: dict[str, TaskResult]
    differences: dict[str, Comparison]
    config: EvaluationConfig
    left_out: dict[str, int]
    """Items of each run that not all runs have; empty when all have the same."""
    notes: list[str]
    """What differs between the runs beside the model."""

    @property
    def metric(self) -> Metric:
        """What the figures measure."""
        return next(iter(self.results.values())).overall.metric

    def verdict(self, difference: Difference) -> Verdict:
        """What the paired interval shows; of few clusters it shows nothing, since a bootstrap of them is too narrow."""
        if difference.clusters < FEW_CLUSTERS:
            return "too few"
        if not difference.excludes_zero:
            return "not shown"
        return "better" if (difference.value > 0.0) == self.metric.higher_is_better else "worse"

    def to_dict(self) -> dict[str, Any]:
        """JSON form: {"runs": {run: figures}, "differences": {run: {"overall", "categories"}}, …}."""
        figures = {name: result.to_dict() for name, result in self.results.items()}
        first = next(iter(figures.values()))
        shared = {key: first[key] for key in ("scorer", "metric", "higher_is_better")}
        kept = ("images", "num_unparsed", "overall", "categories")
        return {
            **shared,
            "intervals": self.config.model_dump(include={"interval", "bootstrap_samples", "confidence", "seed"}),
            "items": first["overall"]["count"],
            "left_out": self.left_out,
            "notes": self.notes,
            "runs": {name: {key: row[key] for key in kept} for name, row in figures.items()},
            "differences": {name: self._with_verdicts(row) for name, row in self.differences.items()},
        }

    def _with_verdicts(self, comparison: Comparison) -> dict[str, Any]:
        def row(difference: Difference) -> dict[str, Any]:
            return {**difference.to_dict(), "verdict": self.verdict(difference)}

        categories = {name: row(difference) for name, difference in comparison.categories.items()}
        return {"overall": row(comparison.overall), "categories": categories}


@dataclass(frozen=True)
class PairedResult:
    """All tasks that the runs have in common, and which others each run has."""

    config: PairedConfig
    tasks: dict[str, TaskComparison]
    not_common: dict[str, list[str]]
    """Tasks that not all runs have, with the runs that have them."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            **self.config.model_dump(mode="json", include={"runs", "reference", "common"}),
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "not_common": self.not_common,
        }


def compare_runs(config: PairedConfig, *, console: Console | None = None) -> PairedResult:
    """Compare all runs on the tasks that all of them have, or on `config.tasks` of these.

    Raises UsageError for fewer than two runs, an unknown reference, task or folder; DataError that names run, task and
    item when an evaluation is not finished or the runs did not answer the same.
    """
    if len(config.runs) < 2:
        raise UsageError(f"compare: give at least two runs, found {len(config.runs)}")
    if config.reference not in config.runs:
        raise UsageError(f"--reference {config.reference}: no such run; {nearest(config.reference, config.runs)}")
    folders = {name: task_folders(folder) for name, folder in config.runs.items()}
    tasks = _common_tasks(config, folders)
    compared = {}
    with counting("comparing", len(tasks) * len(folders), 0, console or default_console()) as counter:
        for task in tasks:
            kept = {name: read_task(found[task]) for name, found in folders.items()}
            compared[task] = _compare_task(task, kept, config, counter.advance)
    others: dict[str, list[str]] = {}
    for name, found in folders.items():
        for task in found:
            if any(task not in other for other in folders.values()):
                others.setdefault(task, []).append(name)
    return PairedResult(config, compared, others)


def _common_tasks(config: PairedConfig, folders: Mapping[str, Mapping[str, Path]]) -> list[str]:
    common = [task for task in folders[config.reference] if all(task in found for found in folders.values())]
    if not common:
        listed = "; ".join(f"'{name}' has {', '.join(found)}" for name, found in folders.items())
        raise DataError(f"no task is common to all runs: {listed}; evaluate them on a task of the same name")
    for task in config.tasks:
        if task not in common:
            raise UsageError(f"--task {task}: not a task of every run; {nearest(task, common)}")
    return [task for task in common if task in config.tasks or not config.tasks]


def _compare_task(
    name: str, kept: Mapping[str, KeptTask], config: PairedConfig, advance: Callable[[int], None]
) -> TaskComparison:
    reference = kept[config.reference]
    _check_scorers(name, kept, config.reference)
    rows = _same_items(name, {run: found.predictions for run, found in kept.items()}, config)
    counts = {run: len(found.predictions) - len(rows[run]) for run, found in kept.items()}
    notes = [note for run, found in kept.items() for note in _other_settings(config.reference, reference, run, found)]
    notes += _other_labels(rows, config.reference)
    task = reference.task.model_copy(update={"extra_scorers": {}})
    first = rows[config.reference]
    results, differences = {}, {}
    for run, found in kept.items():
        # Clusters and categories are the reference's, so that the same items are drawn together and shown together.
        aligned = [
            replace(row, index=one.index, category=one.category, cluster=one.cluster)
            for row, one in zip(rows[run], first, strict=True)
        ]
        results[run] = summarise(aligned, task, reference.config, images=found.images)
        if run != config.reference:
            differences[run] = compare(aligned, first, task, reference.config)
        advance(1)
    return TaskComparison(results, differences, reference.config, counts if any(counts.values()) else {}, notes)


def _check_scorers(name: str, kept: Mapping[str, KeptTask], reference: str) -> None:
    def rule(task: TaskConfig) -> Any:
        return build_scorer(task.scorer, task.scorer_options)

    def told(task: TaskConfig) -> str:
        return f"{task.scorer} {task.scorer_options}" if task.scorer_options else task.scorer

    first = kept[reference].task
    for run, found in kept.items():
        if rule(found.task) != rule(first):
            raise DataError(
                f"task {name}: scored by {told(first)} in '{reference}' and by {told(found.task)} in '{run}'; evaluate "
                "both with one scorer, or choose other tasks with --task"
            )


def _same_items(name: str, runs: Mapping[str, list[Prediction]], config: PairedConfig) -> dict[str, list[Prediction]]:
    """The predictions of each run on the same items in the same order, the reference's."""
    reference = runs[config.reference]
    if any([row.key for row in rows] != [row.key for row in reference] for rows in runs.values()):
        by_id = {run: _by_id(name, run, rows) for run, rows in runs.items()}
        if not config.common:
            _refuse_other_items(name, by_id, config.reference)
        shared = [row.id for row in reference if all(row.id in found for found in by_id.values())]
        if not shared:
            raise DataError(f"task {name}: the runs have no item in common; evaluate them on the same data")
        runs = {run: [found[item] for item in shared] for run, found in by_id.items()}
    for run, rows in runs.items():
        for one, two in zip(runs[config.reference], rows, strict=True):
            _check_item(name, config.reference, one, run, two)
    return dict(runs)


def _by_id(name: str, run: str, rows: list[Prediction]) -> dict[str, Prediction]:
    found: dict[str, Prediction] = {}
    for row in rows:
        if row.id in found:
            raise DataError(
                f"task {name}: the runs have different items, and item {row.id} stands twice in '{run}', so they "
                "cannot be matched by id; give each item an id of its own and evaluate again"
            )
        found[row.id] = row
    return found


def _refuse_other_items(name: str, by_id: Mapping[str, Mapping[str, Prediction]], reference: str) -> None:
    """Raise DataError naming the first item that one run has and another one lacks."""
    first = by_id[reference]
    for run, found in by_id.items():
        for has, lacks, one, two in ((reference, run, first, found), (run, reference, found, first)):
            item = next((item for item in one if item not in two), None)
            if item is not None:
                shared = sum(item in found for item in first)
                raise DataError(
                    f"task {name}: item {item} is in '{has}' and not in '{lacks}' ('{reference}' has {len(first):,} "
                    f"items, '{run}' {len(found):,}, {shared:,} are common); evaluate both on the same items, or add "
                    "--common"
                )


def _check_item(name: str, first: str, one: Prediction, second: str, two: Prediction) -> None:
    for field, what in _SAME_ITEM.items():
        left, right = getattr(one, field), getattr(two, field)
        if left != right:
            raise DataError(
                f"task {name}, item {one.id}: {what} {_told(left)} in '{first}' and {_told(right)} in '{second}'; "
                "evaluate both on the same data"
            )


def _told(value: str | tuple[str, ...]) -> str:
    return repr(value) if isinstance(value, str) else " | ".join(map(repr, value)) or "none"


def _other_settings(reference: str, first: KeptTask, run: str, found: KeptTask) -> list[str]:
    """How a run was asked otherwise than the reference."""
    one, two = ({"images": kept.images, **_asked(kept.task)} for kept in (first, found))

    def told(fields: Mapping[str, Any], key: str) -> str:
        return repr(fields[key]) if key in fields else "its default"

    differing = [key for key in {**one, **two} if (key in one, one.get(key)) != (key in two, two.get(key))]
    return [f"{key}: {reference} {told(one, key)}, {run} {told(two, key)}" for key in differing]


def _asked(task: TaskConfig) -> dict[str, Any]:
    """Every setting by its path, options one by one."""
    fields = task.model_dump(mode="json", exclude=_NOT_ASKED)
    source = fields.pop("source")
    options = {f"options.{key}": value for key, value in source.pop("options").items()}
    named = {f"source.{key}" if key != "source" else key: value for key, value in {**source, **options}.items()}
    return {**fields, **named}


def _other_labels(rows: Mapping[str, list[Prediction]], reference: str) -> list[str]:
    notes = []
    for run, found in rows.items():
        for field, what in (("category", "categories"), ("cluster", "clusters")):
            pairs = zip(rows[reference], found, strict=True)
            if any(getattr(one, field) != getattr(two, field) for one, two in pairs):
                notes.append(f"{what}: those of {reference} are taken, {run} has others")
    return notes
