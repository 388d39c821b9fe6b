"""Report of a training run: its figures next to those of baselines, test images, curves, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unclipped.evaluation.figures import Difference, Figure, shown
from unclipped.studies.page import (
    Cell,
    Commands,
    Gallery,
    GalleryItem,
    Part,
    Picture,
    Points,
    Section,
    Table,
    Text,
    Tiles,
    clock,
    render_page,
    write_page,
)  # fmt: skip
from unclipped.studies.plots import LinePlot, bar_plot, both, line_plot, loss_plot
from unclipped.studies.reading import headline_figures, label_of, read_figures

Figures = Mapping[str, Mapping[str, Figure]]
_GALLERY_NOTE = "They were chosen to show right and wrong answers alike: their share here is not the accuracy."


@dataclass(frozen=True)
class PartInfo:
    """One part of the model in one stage: parameters in all and trained ones, and its learning rate."""

    part: str
    total: int
    trainable: int
    learning_rate: float | None = None


@dataclass(frozen=True)
class StageInfo:
    """One stage of training. Perplexities are those of held-out text, None when they were not measured."""

    name: str
    steps: int
    parts: Sequence[PartInfo]
    batch_size: int | None = None
    seconds: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything on the page; empty fields leave their section out."""

    title: str
    arms: Figures
    """{arm: {category: figure}}: `model` first, then its baselines."""
    description: str = ""
    """What the run is for, one sentence."""
    overall: Mapping[str, Figure] = field(default_factory=dict)
    """{arm: figure} over all items."""
    differences: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    """{baseline: {category: model minus baseline on the same items}}."""
    groups: Figures = field(default_factory=dict)
    """{group: {category: figure}} of the model, such as `held_out` and `not_held_out`."""
    reading: str = ""
    """One paragraph that reads the figures; written from them when empty."""
    difficulty: str = ""
    """How hard the data is and what the test withholds."""
    headline: Sequence[tuple[str, str, str]] = ()
    """(label, value, detail) of the figures at the top; the best figures of the model when empty."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """{arm: rows of its metrics.jsonl} with `stage`, `step` (which counts within its stage) and `loss`."""
    stages: Sequence[StageInfo] = ()
    plots: Sequence[LinePlot] = ()
    """Quantities logged while training, other than the loss."""
    warnings: Sequence[str] = ()
    """Warnings logged while training."""
    pictures: Sequence[Picture] = ()
    gallery: Sequence[GalleryItem] = ()
    times: Mapping[str, float] = field(default_factory=dict)
    """{what: seconds}."""
    costs: Mapping[str, str] = field(default_factory=dict)
    """{what: value with unit}, such as peak memory, FLOPs, device-hours."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """As `studies.environment.environment` gives it."""
    recipe: str = ""
    """The resolved recipe, YAML."""
    notes: Sequence[str] = ()
    """What a reader must know to judge the figures."""
    next_commands: Sequence[tuple[str, str]] = ()
    """(what it does, command)."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Display names of arms and groups."""


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the page to `path` and return the path.

    Raises UnclippedError when the file cannot be written, ImageError when a gallery image cannot be read.
    """
    return write_page(Path(path), data.title, data.description, _sections(data), **_around(data))


def render_report(data: ReportData) -> str:
    """The page as HTML text."""
    return render_page(data.title, data.description, _sections(data), **_around(data))


def _around(data: ReportData) -> dict[str, Any]:
    headline = data.headline or headline_figures(data.arms)
    reading = data.reading or read_figures(data.arms, data.labels)
    return {
        "intro": [Text(reading), *([Tiles(headline)] if headline else [])],
        "facts": [*((name, clock(seconds)) for name, seconds in data.times.items()), *data.costs.items()],
        "environment": data.environment,
        "recipe": data.recipe,
    }


def _sections(data: ReportData) -> list[Section]:
    right = sum(item.is_right for item in data.gallery)
    text = f"{right} of these {len(data.gallery)} answers are right. {_GALLERY_NOTE}"
    return [
        Section("Results by category", _results(data)),
        Section("Seen and unseen content", _groups(data)),
        Section("Test images", [Text(text), Gallery(data.gallery)] if data.gallery else []),
        Section("Training", _training(data)),
        Section("What the encoder sees", data.pictures),
        Section("Notes", [Points(data.notes)] if data.notes else []),
        Section("What to try next", [Commands(data.next_commands)] if data.next_commands else []),
    ]


def _results(data: ReportData) -> list[Part]:
    """For each metric its bars and its table, then the figures over all items."""
    metrics = dict.fromkeys(row.metric for rows in data.arms.values() for row in rows.values())
    labels = {arm: label_of(arm, data.labels) for arm in data.arms}
    parts: list[Part] = [Text(data.difficulty)] if metrics and data.difficulty else []
    for metric in metrics:
        arms = {
            arm: found
            for arm, rows in data.arms.items()
            if (found := {name: row for name, row in rows.items() if row.metric == metric})
        }
        caption = f"{metric.title.capitalize()} on the test questions; whiskers are 95 % intervals."
        parts.append(both(bar_plot, arms, metric, labels, caption=caption))
        head = [metric.title, "questions", *(arm.replace("_", " ") for arm in arms)]
        head += [f"model − {arm.replace('_', ' ')}, paired" for arm in data.differences]
        rows: list[list[Cell]] = []
        for name in dict.fromkeys(name for found in arms.values() for name in found):
            first = next(found[name] for found in arms.values() if name in found)
            cells: list[Cell] = [found.get(name, "–") for found in arms.values()]
            cells += [shown(found.get(name)) for found in data.differences.values()]
            rows.append([name, f"{first.count:,}", *cells])
        parts.append(Table(head, rows))
    if data.overall:
        listed = "; ".join(f"{labels.get(arm, arm)} {row}" for arm, row in data.overall.items())
        parts.append(Text(f"Over all questions: {listed}."))
    return parts


def _groups(data: ReportData) -> list[Part]:
    if not data.groups:
        return []
    names = dict.fromkeys(name for rows in data.groups.values() for name in rows)
    head = ["category"]
    for group in data.groups:
        head += [label_of(group, data.labels), "questions"]
    rows: list[list[Cell]] = [
        [
            name,
            *(cell for found in data.groups.values() for cell in ((found[name], f"{found[name].count:,}")
              if name in found else ("–", "–"))),
        ]
        for name in names
    ]  # fmt: skip
    text = "The model's figures on questions whose content was withheld from training, and on the others."
    return [Text(text), Table(head, rows)]


def _training(data: ReportData) -> list[Part]:
    parts: list[Part] = []
    curves = {arm: rows for arm, rows in data.curves.items() if any("loss" in row for row in rows)}
    if curves:
        labels = {arm: label_of(arm, data.labels) for arm in curves}
        caption = "Training loss, smoothed, with the raw values behind it; vertical lines part the stages."
        parts.append(both(loss_plot, curves, labels, caption=caption))
    if data.warnings:
        parts.append(Points(data.warnings, is_warning=True))
    parts += [both(line_plot, plot, caption=plot.caption, title=plot.title) for plot in data.plots]
    return [*parts, _stage_table(data.stages)] if data.stages else parts


def _stage_table(stages: Sequence[StageInfo]) -> Table:
    """A row for each part of each stage; what belongs to the whole stage stands in its first row."""
    has_perplexity = any(stage.perplexity_after is not None for stage in stages)
    head = ["stage", "part", "trained parameters", "of", "learning rate", "steps × batch", "time"]
    head += ["text perplexity before → after"] if has_perplexity else []
    rows = []
    for stage in stages:
        batch = f" × {stage.batch_size}" if stage.batch_size else ""
        whole = [f"{stage.steps:,}{batch}", "–" if stage.seconds is None else clock(stage.seconds)]
        whole += [_perplexity(stage)] if has_perplexity else []
        for place, part in enumerate(stage.parts):
            rate = part.learning_rate if part.trainable else None
            rows.append(
                [
                    "" if place else stage.name,
                    part.part,
                    f"{part.trainable:,}" if part.trainable else "frozen",
                    f"{part.total:,}",
                    "–" if rate is None else f"{rate:g}",
                    *([""] * len(whole) if place else whole),
                ]
            )
    return Table(head, rows, text_columns=2)


def _perplexity(stage: StageInfo) -> str:
    before, after = stage.perplexity_before, stage.perplexity_after
    if after is None:
        return "–"
    return f"{after:.2f}" if before is None else f"{before:.2f} → {after:.2f}"
