"""What the probes found: figures with intervals, paired differences, and their table, JSON and page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from unclipped.audit.config import EncoderEvaluationConfig
from unclipped.core.documents import read_json
from unclipped.core.errors import DataError
from unclipped.core.files import write_json, write_text
from unclipped.encoders.source import LLM_PREFIX
from unclipped.evaluation.figures import Difference, Figure, is_figure
from unclipped.evaluation.figures import shown as cell

ARM_NAMES = {
    "encoder": "the encoder",
    "random_weights": "random weights",
    "raw_pixels": "raw pixels",
    "majority": "most frequent class",
}
PROBE_NAMES = {
    "knn": "k-NN",
    "linear": "linear",
    "fine_tuning": "fine-tuning",
    "zero_shot": "zero-shot",
    "segmentation": "mIoU",
}
RETRIEVAL = "retrieval_"
RESULTS_FILE = "results.json"
MANY_CLASSES = 12
"""Classes that a report lists side by side; more stand below each other."""


def probe_name(probe: str) -> str:
    """Text form for tables.

    >>> probe_name("retrieval_image_to_text_at_5")
    'image to text R@5'
    """
    if not probe.startswith(RETRIEVAL):
        return PROBE_NAMES[probe]
    way, _, k = probe.removeprefix(RETRIEVAL).rpartition("_at_")
    return f"{way.replace('_', ' ')} R@{k}"


@dataclass(frozen=True)
class Measurement:
    """One probe on one arm's features."""

    probe: str
    arm: str
    figure: Figure
    chosen: str = ""
    """The setting that was best on the development part."""
    development: dict[str, float] = field(default_factory=dict)
    """Accuracy of every setting on the development part."""
    parts: dict[str, float] = field(default_factory=dict)
    """The figure of each class, where it has one."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            **self.figure.to_dict(),
            "chosen": self.chosen,
            "development": self.development,
            "classes": self.parts,
        }


@dataclass(frozen=True)
class EncoderResults:
    """All figures of one evaluation."""

    encoder: dict[str, Any]
    data: dict[str, Any]
    measurements: tuple[Measurement, ...]
    differences: dict[str, dict[str, Difference]]
    """{probe: {arm: the encoder minus that arm, on the same items}}."""

    def of(self, probe: str, arm: str = "encoder") -> Measurement:
        """The measurement of a probe on an arm. Raises KeyError when it was not made."""
        for row in self.measurements:
            if (row.probe, row.arm) == (probe, arm):
                return row
        raise KeyError(f"{probe} on {arm}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        probes: dict[str, Any] = {}
        for row in self.measurements:
            probes.setdefault(row.probe, {"metric": row.figure.metric.name})[row.arm] = row.to_dict()
        for probe, rows in self.differences.items():
            probes[probe]["differences"] = {
                arm: {**row.to_dict(), "excludes_zero": row.excludes_zero} for arm, row in rows.items()
            }
        return {"encoder": self.encoder, "data": self.data, "probes": probes}


def shown(source: str) -> str:
    """A source for reports, which travel: an absolute path is cut to its last two parts.

    >>> shown("llm:/home/me/runs/lm/model")
    'llm:…/lm/model'
    """
    prefix = LLM_PREFIX if source.startswith(LLM_PREFIX) else ""
    path = Path(source.removeprefix(prefix))
    return f"{prefix}…/{'/'.join(path.parts[1:][-2:])}" if path.is_absolute() else source


def rows_of(results: EncoderResults) -> list[tuple[str, str, str, str, str]]:
    """(probe and metric, features, figure, encoder minus these, chosen setting) of each measurement, probe by probe."""
    rows = []
    for probe in dict.fromkeys(row.probe for row in results.measurements):
        for row in results.measurements:
            if row.probe == probe:
                difference = cell(results.differences.get(probe, {}).get(row.arm))
                rows.append((probe_name(probe), ARM_NAMES[row.arm], str(row.figure), difference, row.chosen))
    return rows


HEADINGS = ("probe", "features", "test", "encoder minus these", "chosen on the development part")


def results_table(results: EncoderResults) -> Table:
    """The figures for the terminal; settings that were chosen stand in the report."""
    table = Table(title="probes: accuracy, mIoU, recall at k", title_justify="left")
    for number, heading in enumerate(HEADINGS[:4]):
        table.add_column(heading, justify="right" if number > 1 else "left", overflow="fold")
    last = None
    for row in rows_of(results):
        if last not in (None, row[0]):
            table.add_section()
        table.add_row("" if row[0] == last else row[0], *row[1:4])
        last = row[0]
    return table


def remarks(results: EncoderResults, config: EncoderEvaluationConfig) -> list[str]:
    """What a reader must know besides the figures: grids that ended too early, test images that were trained on."""
    lines = []
    grids = [("linear", "linear head", "linear", "linear.steps", config.linear.learning_rates)]
    if config.fine_tuning is not None:
        rates = config.fine_tuning.learning_rates
        grids.append(("fine_tuning", "fine-tuning", "fine_tuning", "fine_tuning.steps", rates))
    for probe, what, section, steps, rates in grids:
        ends = {f"learning rate {rate:g}" for rate in (min(rates), max(rates))} if len(rates) > 1 else set()
        for row in results.measurements:
            rate = row.chosen.rpartition(", ")[2]
            if row.probe == probe and rate in ends and (probe, row.arm) != ("fine_tuning", "raw_pixels"):
                lines.append(
                    f"The best {what} on {ARM_NAMES[row.arm]} stands at the end of the grid ({rate}); widen "
                    f"{section}.learning_rates or change {steps} before comparing with others' figures."
                )
    shared = results.data.get("labelled", {}).get("test_images_in_train", 0)
    if shared:
        lines.append(f"{shared:,} test images are in the train split too; remove them from one of the two.")
    doubled = results.data.get("retrieval", {}).get("captions_of_several_images", 0)
    if doubled:
        lines.append(
            f"{doubled:,} captions for retrieval are, word for word, those of another image too. Equal "
            "similarity counts as not found, so these are missed at k = 1; use captions that tell images apart."
        )
    return lines


def report_text(results: EncoderResults, config: EncoderEvaluationConfig) -> str:
    """The figures as a Markdown page that stands by itself."""
    encoder = results.encoder
    lines = [f"# Encoder evaluation: {encoder['source']}", ""]
    frozen = "frozen" if config.fine_tuning is None else "frozen but for the fine-tuning rows"
    lines.append(
        f"Family `{encoder['family']}`, {encoder['parameters']:,} parameters, {frozen}; images {config.resize} to "
        f"{encoder['image_size'][0]}x{encoder['image_size'][1]} px. {round(100 * config.confidence)} % intervals, "
        f"bootstrap over test images ({config.bootstrap_samples:,} resamples); differences are paired. k-NN, "
        "linear, fine-tuning and zero-shot rows are accuracies, mIoU rows the mean intersection over union, R@k rows "
        "the share found among the k nearest, resampled by image; higher is better."
    )
    lines += ["", f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    lines += [f"| {' | '.join(row)} |" for row in rows_of(results)]
    if "labelled" in results.data:
        data = results.data["labelled"]
        lines += [
            "",
            f"Labelled images: `{data['source']}`, {data['train']:,} to learn from, {data['development']:,} to choose "
            f"settings on, {data['test']:,} to report, {len(data['classes'])} classes. Always answering the most "
            f"frequent class is right for {data['majority']:.3f} of the test images.",
        ]
    if config.fine_tuning is not None:
        lines += [
            "",
            f"Fine-tuning trains all weights and a linear head, {config.fine_tuning.steps:,} steps of "
            f"{config.fine_tuning.batch_size:,} images for each learning rate, the encoder and random weights alike. "
            "Raw pixels have nothing to train: their row repeats the linear probe.",
        ]
    if "segmentation" in results.data:
        data = results.data["segmentation"]
        lines += [
            "",
            f"Segmentation: `{data['source']}`, {data['train']:,} images to learn from, {data['test']:,} to report, "
            f"{_listed(data['classes'])}. Mean intersection over union of the whole test split.",
            "",
            *_class_table([row for row in results.measurements if row.probe == "segmentation"], data["classes"]),
        ]
    if "retrieval" in results.data:
        data = results.data["retrieval"]
        lines += ["", f"Retrieval: `{data['source']}`, {data['images']:,} images, {data['captions']:,} captions."]
    for remark in remarks(results, config):
        lines += ["", remark]
    lines += ["", "Settings stand in `recipe.yaml`, machine and versions in `environment.json`."]
    if "labelled" in results.data:
        lines.append("The label predicted for every test image stands in `predictions.jsonl`.")
    lines.append("")
    return "\n".join(lines)


def _listed(classes: Sequence[str]) -> str:
    return f"classes {', '.join(classes)}" if len(classes) <= MANY_CLASSES else f"{len(classes)} classes"


def _class_table(rows: Sequence[Measurement], classes: Sequence[str]) -> list[str]:
    """The figure of each class that has one with some features; classes are the rows where they are many."""
    names = [name for name in classes if any(name in row.parts for row in rows)]
    cells = [[f"{row.parts[name]:.3f}" if name in row.parts else "–" for name in names] for row in rows]
    arms = [ARM_NAMES[row.arm] for row in rows]
    if len(classes) > MANY_CLASSES:
        heads, lines = (
            ["class", *arms],
            [[name, *line] for name, line in zip(names, zip(*cells, strict=True), strict=True)],
        )
    else:
        heads, lines = ["features", *names], [[arm, *line] for arm, line in zip(arms, cells, strict=True)]
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)]


def read_probes(folder: Path) -> dict[str, dict[str, Any]]:
    """{probe: {"metric", an arm: its figure, "differences"}} of the results.json in `folder`.

    Raises DataError unless it has the form that `write_results` gave it.
    """
    path, remedy = folder / RESULTS_FILE, "remove it, and the probes run again"
    probes = read_json(path, remedy=remedy).get("probes")
    if not isinstance(probes, dict) or not all(_is_probe(rows) for rows in probes.values()):
        raise DataError(f"{path}: not the results of probes; {remedy}")
    return probes


def _is_probe(rows: Any) -> bool:
    if not isinstance(rows, dict) or not isinstance(metric := rows.get("metric"), str):
        return False
    figures = [row for name, row in rows.items() if name in ARM_NAMES]
    return (
        bool(figures) and all(is_figure(row, metric) for row in figures) and isinstance(rows.get("differences"), dict)
    )


def write_results(results: EncoderResults, config: EncoderEvaluationConfig, folder: Path) -> None:
    """results.json and report.md. Raises UnclippedError when they cannot be written."""
    write_json(folder / RESULTS_FILE, results.to_dict())
    write_text(folder / "report.md", report_text(results, config))
