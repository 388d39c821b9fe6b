"""The paragraph that reads an experiment's figures: what is shown, against which baseline, and what is not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unclipped.studies.report_data import (
    LOWER_IS_BETTER,
    PERCENT_METRICS,
    ReportData,
    Row,
    formatted,
    formatted_interval,
    metric_of,
)

ARM_LABELS = {
    "model": "model",
    "blind": "blind (trained without images)",
    "random_encoder": "random encoder (trained alike)",
}


def label_of(data: ReportData, arm: str) -> str:
    """Display name of an arm or group."""
    return data.labels.get(arm) or ARM_LABELS.get(arm) or arm.replace("_", " ")


def _leads(better: Row, worse: Row) -> bool:
    """Whether the 95 % intervals are disjoint in favour of the first row."""
    if metric_of(better) in LOWER_IS_BETTER:
        return better["high"] < worse["low"]
    return better["low"] > worse["high"]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def compare_arms(model: Mapping[str, Row], other: Mapping[str, Row]) -> dict[str, list[str]]:
    """Categories in which the model's interval lies wholly `above` or `below` the other's, or they overlap (`open`)."""
    found: dict[str, list[str]] = {"above": [], "below": [], "open": []}
    for name, row in model.items():
        if name not in other or metric_of(other[name]) != metric_of(row):
            continue
        side = "above" if _leads(row, other[name]) else "below" if _leads(other[name], row) else "open"
        found[side].append(name)
    return found


def read_figures(data: ReportData) -> str:
    """One paragraph from the figures alone. It calls a lead only what disjoint intervals show."""
    model = data.arms.get("model", {})
    if not model:
        return "No figures: no task was evaluated."
    count = sum(int(row["count"]) for row in model.values())
    plural = "category" if len(model) == 1 else "categories"
    sentences = [f"The model answered {count:,} test questions in {len(model)} {plural}."]
    by_metric: dict[str, list[str]] = {}
    for name, row in model.items():
        by_metric.setdefault(metric_of(row), []).append(name)
    for metric, names in by_metric.items():
        ordered = sorted(names, key=lambda name: model[name][metric], reverse=metric not in LOWER_IS_BETTER)
        best, worst = ordered[0], ordered[-1]
        word = metric.replace("_", " ")
        text = f"Its best {word} is {formatted(metric, model[best][metric])} ({best})"
        if worst != best:
            text += f", its worst {formatted(metric, model[worst][metric])} ({worst})"
        sentences.append(text + ".")
    for arm, rows in data.arms.items():
        if arm == "model":
            continue
        sides = compare_arms(model, rows)
        against = f"Against {label_of(data, arm)}"
        if sides["above"]:
            gains = [name for name in sides["above"] if metric_of(model[name]) in PERCENT_METRICS]
            size = ""
            if gains:
                points = [100 * (model[name]["accuracy"] - rows[name]["accuracy"]) for name in gains]
                size = (
                    f" (by {min(points):.0f} to {max(points):.0f} points)"
                    if len(points) > 1
                    else (f" (by {points[0]:.0f} points)")
                )
            sentences.append(f"{against} it is better in {_listed(sides['above'])}{size}: the intervals are disjoint.")
        else:
            sentences.append(f"{against} no category shows a lead: no intervals are disjoint in its favour.")
        if sides["below"]:
            sentences.append(f"It is worse than that arm in {_listed(sides['below'])}.")
        if sides["above"] and sides["open"]:
            sentences.append(f"In {_listed(sides['open'])} the intervals overlap, so no difference is shown.")
    return " ".join(sentences)


def headline_figures(data: ReportData) -> list[tuple[str, str, str]]:
    """(label, value, detail) for the top of the page: at most four categories, the largest lead over blind first."""
    model, blind = data.arms.get("model", {}), data.arms.get("blind", {})

    def lead(name: str) -> float:
        row = model[name]
        metric = metric_of(row)
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        return sign * (row[metric] - blind.get(name, {}).get(metric, 0.0))

    figures = []
    for name in sorted(model, key=lead, reverse=True)[:4]:
        row = model[name]
        metric = metric_of(row)
        detail = f"95 % interval {formatted_interval(row)}"
        if metric in blind.get(name, {}):
            detail += f"; blind {formatted(metric, blind[name][metric])}"
        figures.append((f"{name} · {metric.replace('_', ' ')}", formatted(metric, row[metric]), detail))
    return figures
