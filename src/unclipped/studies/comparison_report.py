"""The page of a comparison of objectives: every figure with its interval, arms as rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclipped.evaluation.figures import Difference, Figure, Metric
from unclipped.studies.environment import environment
from unclipped.studies.page import Cell, Links, Part, Points, Section, Table, Text, clock, write_page
from unclipped.studies.plots import both, forest_plot

_DECLARED = {"self_supervised": "images alone", "contrastive": "compared with text", "sigmoid": "compared with text",
             "captioning": "captions"}  # fmt: skip
_CONTROLS = {"vlm_minus_random": "random encoder", "vlm_minus_blind": "blind"}


def write_comparison_report(
    path: Path, results: Mapping[str, Any], *, title: str, description: str = "", recipe_text: str = ""
) -> Path:
    """Write the page about `comparison.json`'s contents and return its path. Raises UnclippedError when it cannot."""
    seeds = results.get("seeds", [])
    intro: list[Part] = []
    if found := findings(results):
        each = f", in each of {len(seeds)} seeds" if seeds else ""
        intro += [Text(f"By paired 95 % intervals on the same items{each}:"), Points(found)]
    intro.append(Text(limits(results)))
    sections = [_pretraining(results["pretraining"], seeds), *_probe_sections(results), *_vlm_sections(results)]
    more: dict[str, Any] = {"environment": environment(), "recipe": recipe_text}
    return write_page(path, title, description, sections, intro=intro, **more)


def _pretraining(rows: Mapping[str, Any], seeds: list[int]) -> Section:
    """What each arm learnt from, how long it took, its losses and ranks."""
    head = ["arm", "learnt from", "samples seen", "time", "samples a second", "loss, first → last",
            "rank of features, first → last"]  # fmt: skip
    cells: list[list[Cell]] = []
    for arm, row in rows.items():
        own = [(str(seed), report) for seed, report in row["reports"].items()] if seeds else [(arm, row["report"])]
        cells.append(
            [
                Links(f"{arm}, seed " if seeds else "", own),
                str(_DECLARED.get(row["declared"], row["declared"])),
                f"{row['samples']:,}",
                clock(row["seconds"]),
                f"{row['samples_per_second']:.0f}",
                "{:.3f} → {:.3f}".format(*row["loss"]),
                "{:.1f} → {:.1f}".format(*row["rank"]) if row["rank"] else "–",
            ]
        )
    parts: list[Part] = [Table(head, cells, text_columns=2)]
    if seeds:
        whole = [[Links("", [(f"seed {seed}", f"seed-{seed}/report.html") for seed in seeds])]]
        text = f"Losses and ranks are those of seed {seeds[0]}, times the sum of all."
        parts += [Text(text), Table(["whole comparisons"], whole)]
    warnings = [f"{arm}: {warning}" for arm, row in rows.items() for warning in row["warnings"]]
    return Section("Pretraining", [*parts, *([Points(warnings, is_warning=True)] if warnings else [])])


def _section(
    title: str, rows: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]], *, seeds: bool
) -> Section:
    """The arms' figures as a plot and a table, with each arm's difference from each control."""
    figures = {arm: Figure.read(row) for arm, row in rows.items()}
    metric = next(iter(figures.values())).metric
    head = ["arm", "items", "mean [lowest, highest seed]" if seeds else "figure [95 %]"]
    head += [f"minus {name}, paired{metric.points and ' (points)'}" for name in differences]
    cells = [
        [
            arm.replace("_", " "),
            f"{row.count:,}",
            str(row),
            *(_difference(found.get(arm), metric) for found in differences.values()),
        ]
        for arm, row in figures.items()
    ]
    return Section(title, [both(forest_plot, title, figures), Table(head, cells)])


def _difference(row: Mapping[str, Any] | None, metric: Metric) -> str:
    if row is None:
        return "–"
    above = f", above in {row['above']} of {row['of']}" if "above" in row else ""
    return f"{Difference.read(row, metric)}{above}"


def _probe_sections(results: Mapping[str, Any]) -> list[Section]:
    """For each probe: the arms, then random weights and raw pixels of the first arm's evaluation."""
    sections = []
    for probe, arms in results["probes"].items():
        first = next(iter(arms.values()))
        rows = {arm: found["encoder"] for arm, found in arms.items()}
        rows |= {other: first[other] for other in ("random_weights", "raw_pixels") if other in first}
        differences = {arm: found["minus_random"] for arm, found in arms.items()}
        title = f"Frozen features: {probe} ({first['metric'].replace('_', ' ')})"
        sections.append(_section(title, rows, {"random weights": differences}, seeds="seeds" in results))
    return sections


def _vlm_sections(results: Mapping[str, Any]) -> list[Section]:
    """The trained models: each task over all its questions, then each category."""
    sections = []
    for task, rows in results["vlm_overall"].items():
        differences = {
            name: {arm: tasks.get(task) for arm, tasks in results[key].items()}
            for key, name in _CONTROLS.items()
            if results[key]
        }
        title = f"Trained models: {task}, all questions"
        sections.append(_section(title, rows, differences, seeds="seeds" in results))
    categories = list(dict.fromkeys(name for rows in results["vlm"].values() for name in rows))
    for category in categories if len(categories) > 1 else ():
        rows = {arm: found[category] for arm, found in results["vlm"].items() if category in found}
        sections.append(_section(f"Trained models: {category}", rows, {}, seeds="seeds" in results))
    return sections


def findings(results: Mapping[str, Any]) -> list[str]:
    """One line a figure: which arms lie above random weights, and above the blind model, beyond chance."""
    lines = []
    for probe, arms in results["probes"].items():
        better = [a for a, found in arms.items() if found["minus_random"] and _is_above(found["minus_random"])]
        lines.append(f"{probe}: {_listed(better, len(arms))} above random weights")
    for name, key in (("a random encoder", "vlm_minus_random"), ("the blind model", "vlm_minus_blind")):
        rows = {arm: tasks for arm, tasks in results[key].items() if arm in results["pretraining"]}
        for task in dict.fromkeys(task for tasks in rows.values() for task in tasks):
            better = [arm for arm, tasks in rows.items() if _is_above(tasks[task])]
            lines.append(f"trained models on {task}: {_listed(better, len(rows))} above {name}")
    return lines


def limits(results: Mapping[str, Any]) -> str:
    """What the comparison cannot show."""
    seeds = results.get("seeds", [])
    runs = (
        f"{len(seeds)} seeds were run: a figure is their mean, with the lowest and the highest seed beside it."
        if seeds
        else "One seed was run: the intervals hold the chance of the test items, not that of another training."
    )
    return (
        f"{runs} Losses of different objectives cannot be compared, and the order of arms at this size says nothing "
        "about larger ones."
    )


def _is_above(row: Mapping[str, Any]) -> bool:
    """Whether the paired interval lies above zero, with several seeds that of each."""
    return row["above"] == row["of"] if "above" in row else row["low"] > 0


def _listed(names: list[str], count: int) -> str:
    if not names:
        return "no arm is"
    if len(names) == count:
        return "all arms are"
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
