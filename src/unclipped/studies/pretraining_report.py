"""The report of a pretraining run: loss, health of the encoder, gradients, pictures, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unclipped.studies.environment import environment
from unclipped.studies.page import Picture, clock
from unclipped.studies.plots import LinePlot
from unclipped.studies.report import ReportData, write_report
from unclipped.studies.summary import stage_rows
from unclipped.training.config import PretrainConfig
from unclipped.training.pretraining_pictures import PICTURES
from unclipped.training.progress import read_metrics
from unclipped.training.record import finished_record

_CAPTIONS = {
    "views": "Images as the objective gets them, after augmentation; crops of one image stand in one row.",
    "reconstruction": "Image, the patches that the encoder sees, and what the decoder puts in the place of the others",
    "patches": "Images, and the three principal components of their patch features as colours: alike colours are alike "
    "features",
}
_MOMENTS = {"start": "before the first step", "end": "after the last step"}


def write_pretraining_report(
    config: PretrainConfig,
    run: str | Path,
    *,
    title: str,
    description: str = "",
    recipe_text: str = "",
    next_commands: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `run/report.html` about a finished run folder of `unclipped pretrain` and return its path.

    Raises UnclippedError when a file of the run cannot be read or the page cannot be written.
    """
    run = Path(run)
    record = finished_record(run)
    entries, total = record["stages"], record["total"]
    metrics = read_metrics(run / "metrics.jsonl")
    rows = _counted_on(metrics, entries)
    data = ReportData(
        title=title,
        description=description,
        arms={},
        reading=_reading(config, rows, entries),
        headline=_headline(config, rows, entries),
        curves={"model": metrics},
        labels={"model": config.objective.replace("_", " ")},
        stages=stage_rows({stage.name: {**stage.train} for stage in config.stages()}, record),
        plots=_plots(rows),
        notes=[f"{entry['name']}: {note}" for entry in entries for note in entry.get("notes", [])],
        warnings=[warning for row in rows for warning in row.get("warnings", [])],
        pictures=_pictures(run / PICTURES, names_stages=len(entries) > 1),
        times={"training": total["seconds"]},
        costs={
            "peak memory": f"{total['peak_memory_bytes'] / 2**30:.2f} GiB",
            "computation": f"{total['flops']:.2e} FLOPs",
            "device-hours": f"{total['device_hours']:.3f}",
        },
        environment=environment(),
        recipe=recipe_text,
        next_commands=next_commands,
    )
    return write_report(run / "report.html", data)


def _counted_on(rows: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Rows of metrics with their steps counted on through the stages."""
    before = [sum(entry["steps"] for entry in entries[:index]) for index in range(len(entries))]
    return [{**row, "step": row["step"] + before[row["stage_index"]]} for row in rows]


def _reading(config: PretrainConfig, rows: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> str:
    """What the curves say, and what they cannot say."""
    name = config.objective.replace("_", " ")
    spans = [f"{entry['steps'] * entry['batch_size']:,} samples in {clock(entry['seconds'])}" for entry in entries]
    text = f"Trained by {name} on {', then '.join(spans)}. "
    for index, entry in enumerate(entries):
        losses = [row["loss"] for row in rows if row["stage_index"] == index]
        where = f" in {entry['name']}" if len(entries) > 1 else ""
        text += f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f}{where}. " if losses else ""
    healths = [row["health"] for row in rows if "health" in row]
    if healths:
        first, last = healths[0]["rank"], healths[-1]["rank"]
        text += f"The effective rank of its features went from {first:.1f} to {last:.1f} (of {_most(healths[-1])}). "
    if any("warnings" in row for row in rows):
        text += "There were warnings, see below. "
    if config.objective == "language_model":
        return text.rstrip()
    return text + (
        "A falling loss does not say what the features are worth: `unclipped eval-encoder` does, against random "
        "weights and raw pixels."
    )


def _most(health: Mapping[str, float]) -> str:
    return f"at most {health['images']:.0f}, the images that were measured"


def _headline(
    config: PretrainConfig, rows: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    entry, steps = entries[-1], sum(entry["steps"] for entry in entries)
    tiles = [("loss", f"{entry['final_loss']:.3f}", f"at the last of {steps:,} steps")]
    rate = entry["samples_per_second"]["median"]
    unit = "rows" if config.objective == "language_model" else "images"
    waits = [row["data_waiting_share"] for row in rows if "data_waiting_share" in row]
    share = sum(waits) / len(waits) if waits else None
    waiting = "" if share is None else f"; {100 * share:.0f} % of the time waiting for data"
    where = f" of {entry['name']}" if len(entries) > 1 else ""
    tiles.append((f"{unit} a second", f"{rate:,.0f}", f"median{where}{waiting}"))
    healths = [row["health"] for row in rows if "health" in row]
    if healths:
        tiles.append(("effective rank", f"{healths[-1]['rank']:.1f}", f"of pooled features, {_most(healths[-1])}"))
    return tiles


def _plots(rows: Sequence[Mapping[str, Any]]) -> list[LinePlot]:
    """Loss parts, gradient norm, learning rates and health, as far as the run has them."""
    names = sorted({name for row in rows for name in row["parts"]})
    rates = sorted({name for row in rows for name in row["learning_rates"]})
    plots = [
        LinePlot("Parts of the loss", _lines(rows, names, lambda row, name: row["parts"].get(name)), "value")
        if len(names) > 1
        else None,
        _health_plot(
            rows, "Effective rank", ("rank",), "rank", "Of the pooled features; a fall towards 1 is a collapse."
        ),
        _health_plot(
            rows,
            "Spread and teacher",
            ("spread", "teacher_entropy"),
            "share",
            "Spread: 0 where all features are equal. Teacher entropy: 0 all on one prototype, 1 all prototypes alike.",
        ),
        _health_plot(
            rows,
            "Prototypes in use",
            ("prototypes",),
            "number",
            "exp of the entropy of the mean assignment in a batch.",
        ),
        LinePlot("Gradient norm", _norms(rows), "norm before clipping"),
        LinePlot(
            "Learning rate",
            _lines(rows, rates, lambda row, name: row["learning_rates"].get(name)),
            "rate",
            is_linear=True,
        ),
        _schedules_plot(rows),
    ]
    return [plot for plot in plots if plot is not None]


def _norms(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The norm of the whole gradient, and those of sub-modules where they are clipped by themselves."""
    modules = sorted({name for row in rows for name in row.get("gradient_norms", {})})
    lines = _lines(rows, modules, lambda row, name: row.get("gradient_norms", {}).get(name))
    lines = {name.replace("_", " "): points for name, points in lines.items()}
    return _lines(rows, ["norm"], lambda row, _: row["gradient_norm"]) | lines


def _schedules_plot(rows: Sequence[Mapping[str, Any]]) -> LinePlot | None:
    """Weight decay, and what the objective changes with the steps."""
    names = sorted({name for row in rows for name in row.get("schedules", {})})
    lines = _lines(rows, names, lambda row, name: row.get("schedules", {}).get(name))
    lines = {name.replace("_", " ").replace(".", ", "): points for name, points in lines.items()}
    return LinePlot("Schedules", lines, "value", is_linear=True) if lines else None


def _health_plot(
    rows: Sequence[Mapping[str, Any]], title: str, names: Sequence[str], axis: str, caption: str
) -> LinePlot | None:
    lines = _lines(rows, names, lambda row, name: row.get("health", {}).get(name))
    lines = {name.replace("_", " "): points for name, points in lines.items() if points}
    return LinePlot(title, lines, axis, caption) if lines else None


def _lines(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], value: Callable[[Mapping[str, Any], str], float | None]
) -> dict[str, list[tuple[int, float]]]:
    return {name: [(row["step"], v) for row in rows if (v := value(row, name)) is not None] for name in names}


def _pictures(folder: Path, *, names_stages: bool) -> list[Picture]:
    """The pictures that training drew, with what they show; those before training first, stage by stage."""
    kinds = list(_CAPTIONS)
    paths = [path for path in folder.rglob("*.png") if _kind(path) in _CAPTIONS]
    pictures = []
    for path in sorted(paths, key=lambda path: (path.parent, kinds.index(_kind(path)), path.stem.endswith("-end"))):
        caption, moment = _CAPTIONS[_kind(path)], path.stem.partition("-")[2]
        caption = f"{caption}, {_MOMENTS[moment]}." if moment else caption
        stage = f"{path.parent.name.partition('-')[2]}: " if names_stages else ""  # folders are called NN-STAGE
        pictures.append(Picture(path, stage + caption))
    return pictures


def _kind(path: Path) -> str:
    return path.stem.partition("-")[0]
