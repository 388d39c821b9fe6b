"""The page of a comparison of objectives: every figure with its interval, arms as rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclipped.core.files import write_text
from unclipped.studies.environment import environment
from unclipped.studies.plots import forest_plot
from unclipped.studies.report import environment_rows, page_environment
from unclipped.studies.report_data import NOT_METRICS

_DECLARED = {"self_supervised": "images alone", "contrastive": "compared with text", "sigmoid": "compared with text",
             "captioning": "captions"}  # fmt: skip


def write_comparison_report(
    path: Path, results: Mapping[str, Any], *, title: str, description: str = "", recipe_text: str = ""
) -> Path:
    """Write the page about `comparison.json`'s contents and return its path. Raises UnclippedError when it cannot."""
    pages = page_environment()
    pages.filters["interval"] = lambda row: f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    pages.filters["difference"] = _difference
    figures = [*_probe_figures(results["probes"]), *_vlm_figures(results)]
    text = pages.get_template("comparison.html.j2").render(
        title=title,
        description=description,
        findings=findings(results),
        limits=limits(results),
        pretraining=results["pretraining"],
        declared=_DECLARED,
        seeds=results.get("seeds", []),
        figures=[
            figure
            | {
                "wide": forest_plot(figure["title"], figure["rows"], narrow=False),
                "narrow": forest_plot(figure["title"], figure["rows"], narrow=True),
            }
            for figure in figures
        ],
        environment=environment_rows(environment()),
        recipe=recipe_text,
    )
    write_text(path, text)
    return path


def _difference(row: Mapping[str, Any]) -> str:
    value, low, high = (f"{row[key]:+.3f}".replace("-", "−") for key in ("value", "low", "high"))
    above = f", above in {row['above']} of {row['of']}" if "above" in row else ""
    return f"{value} [{low}, {high}]{above}"


def _probe_figures(probes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each probe one figure: the arms, then random weights and raw pixels of the first arm's evaluation."""
    figures = []
    for probe, arms in probes.items():
        rows = {arm: found["encoder"] for arm, found in arms.items()}
        first = next(iter(arms.values()))
        for other in ("random_weights", "raw_pixels"):
            if other in first:
                rows[other] = first[other]
        differences: dict[str, Any] = {}
        for arm, found in arms.items():
            if (row := found["minus_random"]) is not None:
                differences[arm] = row | {"value": row["difference"]}
        title = f"Frozen features: {probe} ({first['metric'].replace('_', ' ')})"
        figures.append({"title": title, "rows": rows, "differences": {"random weights": differences}})
    return figures


def _vlm_figures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trained models: each task over all its questions, then each category."""
    figures = []
    for task, rows in results["vlm_overall"].items():
        differences = {
            name: {arm: tasks[task] for arm, tasks in results[key].items() if task in tasks}
            for name, key in (("random encoder", "vlm_minus_random"), ("blind", "vlm_minus_blind"))
            if results[key]
        }
        plain = {arm: _plain(row) for arm, row in rows.items()}
        figures.append({"title": f"Trained models: {task}, all questions", "rows": plain, "differences": differences})
    categories = list(dict.fromkeys(name for rows in results["vlm"].values() for name in rows))
    for category in categories if len(categories) > 1 else ():
        rows = {arm: _plain(found[category]) for arm, found in results["vlm"].items() if category in found}
        figures.append({"title": f"Trained models: {category}", "rows": rows, "differences": {}})
    return figures


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    metric = next(name for name in row if name not in NOT_METRICS)
    return {"value": row[metric], "low": row["low"], "high": row["high"], "count": row["count"]}


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
