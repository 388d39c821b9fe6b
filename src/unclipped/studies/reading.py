"""The paragraph that reads an experiment's figures: what is shown, against which baseline, and what is not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unclipped.evaluation.figures import Figure

ARM_LABELS = {
    "model": "model",
    "blind": "blind (trained without images)",
    "random_encoder": "random encoder (trained alike)",
}


def label_of(arm: str, labels: Mapping[str, str]) -> str:
    """Display name of an arm or group."""
    return labels.get(arm) or ARM_LABELS.get(arm) or arm.replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def compare_arms(model: Mapping[str, Figure], other: Mapping[str, Figure]) -> dict[str, list[str]]:
    """Categories in which the model's interval lies wholly `above` or `below` the other's, or they overlap (`open`)."""
    found: dict[str, list[str]] = {"above": [], "below": [], "open": []}
    for name, row in model.items():
        if name not in other or other[name].metric != row.metric:
            continue
        side = "above" if row.leads(other[name]) else "below" if other[name].leads(row) else "open"
        found[side].append(name)
    return found


def read_figures(arms: Mapping[str, Mapping[str, Figure]], labels: Mapping[str, str]) -> str:
    """One paragraph from the figures alone. It calls a lead only what disjoint intervals show."""
    model = arms.get("model", {})
    if not model:
        return "No figures: no task was evaluated."
    count = sum(row.count for row in model.values())
    plural = "category" if len(model) == 1 else "categories"
    sentences = [f"The model answered {count:,} test questions in {len(model)} {plural}."]
    for metric in dict.fromkeys(row.metric for row in model.values()):
        names = [name for name, row in model.items() if row.metric == metric]
        ordered = sorted(names, key=lambda name: model[name].value, reverse=metric.higher_is_better)
        best, worst = ordered[0], ordered[-1]
        text = f"Its best {metric.title} is {model[best].shown} ({best})"
        if worst != best:
            text += f", its worst {model[worst].shown} ({worst})"
        sentences.append(text + ".")
    for arm, rows in arms.items():
        if arm == "model":
            continue
        sides = compare_arms(model, rows)
        against = f"Against {label_of(arm, labels)}"
        if sides["above"]:
            gains = [name for name in sides["above"] if model[name].metric.is_percent]
            size = ""
            if gains:
                points = [100 * (model[name].value - rows[name].value) for name in gains]
                span = f"{min(points):.0f} to {max(points):.0f}" if len(points) > 1 else f"{points[0]:.0f}"
                size = f" (by {span} points)"
            sentences.append(f"{against} it is better in {listed(sides['above'])}{size}: the intervals are disjoint.")
        else:
            sentences.append(f"{against} no category shows a lead: no intervals are disjoint in its favour.")
        if sides["below"]:
            sentences.append(f"It is worse than that arm in {listed(sides['below'])}.")
        if sides["above"] and sides["open"]:
            sentences.append(f"In {listed(sides['open'])} the intervals overlap, so no difference is shown.")
    return " ".join(sentences)


def headline_figures(arms: Mapping[str, Mapping[str, Figure]]) -> list[tuple[str, str, str]]:
    """(label, value, detail) for the top of the page: at most four categories, the largest lead over blind first."""
    model, blind = arms.get("model", {}), arms.get("blind", {})

    def without_images(name: str) -> Figure | None:
        row = blind.get(name)
        return row if row is not None and row.metric == model[name].metric else None

    def lead(name: str) -> float:
        other = without_images(name)
        size = model[name].value - (0.0 if other is None else other.value)
        return size if model[name].metric.higher_is_better else -size

    figures = []
    for name in sorted(model, key=lead, reverse=True)[:4]:
        row, other = model[name], without_images(name)
        detail = f"95 % interval {row.interval}" + ("" if other is None else f"; blind {other.shown}")
        figures.append((f"{name} · {row.metric.title}", row.shown, detail))
    return figures
