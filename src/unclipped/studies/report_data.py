"""What a report is made of: plain data, put together by whoever ran the experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

Row = Mapping[str, Any]
"""A figure: {metric: value, "low", "high", "count"}; the metric is the key that is none of the others."""


@dataclass(frozen=True)
class GalleryItem:
    """A test image with its question, the gold answer and what the model said. `image`: Pillow object, file or None."""

    image: Image.Image | Path | str | None
    question: str
    answer: str
    prediction: str
    is_right: bool
    category: str | None = None


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
class LinePlot:
    """Values against training steps: {line: [(step, value)]}."""

    title: str
    lines: Mapping[str, Sequence[tuple[int, float]]]
    axis: str
    """What the vertical axis shows."""
    caption: str = ""
    is_linear: bool = False
    """Never a logarithmic axis."""


@dataclass(frozen=True)
class Picture:
    """A PNG file with the sentence under it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class ReportData:
    """Everything on the page; empty fields leave their section out."""

    title: str
    arms: Mapping[str, Mapping[str, Row]]
    """{arm: {category: row}}: `model` first, then its baselines. The same form as results.json."""
    description: str = ""
    """What the run is for, one sentence."""
    overall: Mapping[str, Row] = field(default_factory=dict)
    """{arm: row} over all items."""
    differences: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """{baseline: {category: {"value", "low", "high"}}}: model minus baseline on the same items."""
    groups: Mapping[str, Mapping[str, Row]] = field(default_factory=dict)
    """{group: {category: row}} of the model, such as `held_out` and `not_held_out`."""
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
    """What was watched while training, beside the loss."""
    warnings: Sequence[str] = ()
    """What was said while training."""
    pictures: Sequence[Picture] = ()
    gallery: Sequence[GalleryItem] = ()
    gallery_note: str = "They were chosen to show right and wrong answers alike: their share here is not the accuracy."
    times: Mapping[str, float] = field(default_factory=dict)
    """{what: seconds}."""
    costs: Mapping[str, str] = field(default_factory=dict)
    """{what: value with unit}, such as peak memory, FLOPs, device-hours."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """As `studies.environment.environment` gives it."""
    recipe: str = ""
    """The resolved recipe, YAML."""
    notes: Sequence[str] = ()
    """What a reader must know beside the figures."""
    next_commands: Sequence[tuple[str, str]] = ()
    """(what it does, command)."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Display names of arms and groups."""


NOT_METRICS = {"low", "high", "count", "clusters", "method"}
LOWER_IS_BETTER = {"character_error_rate"}
PERCENT_METRICS = {"accuracy"}


def metric_of(row: Row) -> str:
    """Name of the figure in a row. Raises ValueError unless there is exactly one."""
    names = [name for name in row if name not in NOT_METRICS]
    if len(names) != 1:
        raise ValueError(f"expected one metric beside {sorted(NOT_METRICS)} in a results row, found {names}")
    return names[0]


def formatted(metric: str, value: float) -> str:
    """A figure as the report prints it: percent for accuracies, three decimals otherwise."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%" if metric in PERCENT_METRICS else f"{value:.3f}"


def formatted_interval(row: Row) -> str:
    """The interval of a row, the unit once: `96.4 – 99.2 %` (with no-break spaces)."""
    metric = metric_of(row)
    low, high = (formatted(metric, row[bound]) for bound in ("low", "high"))
    return low.removesuffix("\N{NO-BREAK SPACE}%") + "\N{NO-BREAK SPACE}–\N{WORD JOINER}\N{NO-BREAK SPACE}" + high


def formatted_difference(row: Mapping[str, float], metric: str) -> str:
    """A difference with its interval: in points for accuracies, three decimals otherwise; always with its sign."""
    scale, digits = (100.0, 1) if metric in PERCENT_METRICS else (1.0, 3)
    value, low, high = (f"{scale * row[key]:+.{digits}f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def clock(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
