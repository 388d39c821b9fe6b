"""Figures with intervals: metrics with unit and direction, one JSON form, one text form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Metric:
    """What a figure measures: its direction, and how it is written."""

    name: str
    higher_is_better: bool = True
    is_percent: bool = False
    """Shown in percent, its differences in points."""
    digits: int = 3
    """Decimals where it is no percentage."""

    @property
    def title(self) -> str:
        """Name for headings: `character error rate`."""
        return self.name.replace("_", " ")

    @property
    def direction(self) -> str:
        """`higher is better` or `lower is better`."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"

    @property
    def scale(self) -> float:
        """Factor between values and what is shown."""
        return 100.0 if self.is_percent else 1.0

    @property
    def points(self) -> str:
        """Unit of differences: `points` or nothing."""
        return "points" if self.is_percent else ""

    def number(self, value: float, *, signed: bool = False) -> str:
        """A value without its unit: `89.7` or `0.897`, with its sign where asked for."""
        text = f"{self.scale * value:{'+' if signed else ''}.{1 if self.is_percent else self.digits}f}"
        return text.replace("-", "−") if signed else text

    def text(self, value: float) -> str:
        """A value with its unit: `89.7 %` or `0.897`."""
        return self.number(value) + (f"{_SPACE}%" if self.is_percent else "")


VALUE = Metric("value")
"""Of figures that need no name."""
ACCURACY = Metric("accuracy", is_percent=True)
ANLS = Metric("anls")
CHARACTER_ERROR_RATE = Metric("character_error_rate", higher_is_better=False)
MEAN_IOU = Metric("mean_iou")
RECALL = Metric("recall")
KL = Metric("value", higher_is_better=False, digits=4)
_METRICS = {metric.name: metric for metric in (VALUE, ACCURACY, ANLS, CHARACTER_ERROR_RATE, MEAN_IOU, RECALL)}
_OTHERS = {"low", "high", "count", "clusters", "method", "values", "most"}
"""Keys of a figure's JSON form that are not its value."""


@dataclass(frozen=True)
class Figure:
    """A value with its interval, over `count` items in `clusters` groups drawn together."""

    value: float
    low: float
    high: float
    count: int
    metric: Metric = VALUE
    clusters: int | None = None
    method: Literal["bootstrap", "wilson"] | None = None

    @classmethod
    def read(cls, row: Mapping[str, Any], metric: Metric | None = None) -> Figure:
        """A figure from its JSON form, of `metric` or the one it names. Raises ValueError unless it has one value."""
        names = [name for name in row if name not in _OTHERS]
        if len(names) != 1:
            raise ValueError(f"figure: expected one value next to {sorted(_OTHERS)}, found {names}")
        metric = metric or metric_called(names[0])
        return cls(row[names[0]], row["low"], row["high"], row.get("count", 0), metric)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: {metric: value, "low", "high", "count"}, and how the interval was made where that is known."""
        made = {"clusters": self.clusters, "method": self.method}
        known = {name: value for name, value in made.items() if value is not None}
        return {self.metric.name: self.value, "low": self.low, "high": self.high, "count": self.count, **known}

    def row(self) -> dict[str, Any]:
        """JSON form of the value, its interval and its count alone."""
        return Figure(self.value, self.low, self.high, self.count, self.metric).to_dict()

    def leads(self, other: Figure) -> bool:
        """Whether the intervals are disjoint in favour of this figure."""
        return self.low > other.high if self.metric.higher_is_better else self.high < other.low

    @property
    def shown(self) -> str:
        """`89.7 %`."""
        return self.metric.text(self.value)

    @property
    def interval(self) -> str:
        """`88.3 – 91.0 %`, with no-break spaces."""
        return f"{self.metric.number(self.low)}{_SPACE}–\N{WORD JOINER}{_SPACE}{self.metric.text(self.high)}"

    def __str__(self) -> str:
        """`89.7 % [88.3, 91.0]`."""
        return f"{self.shown} [{self.metric.number(self.low)}, {self.metric.number(self.high)}]"


@dataclass(frozen=True)
class Difference:
    """First minus second figure on the same items, with the interval of the paired difference."""

    value: float
    low: float
    high: float
    count: int
    clusters: int
    metric: Metric = VALUE

    @classmethod
    def read(cls, row: Mapping[str, Any], metric: Metric = VALUE) -> Difference:
        """A difference from its JSON form, between figures of `metric`."""
        return cls(row["value"], row["low"], row["high"], row.get("count", 0), row.get("clusters", 0), metric)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: {"value", "low", "high", "count", "clusters"}."""
        names = ("value", "low", "high", "count", "clusters")
        return {name: getattr(self, name) for name in names}

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0.0 or self.high < 0.0

    def __str__(self) -> str:
        """`+24.7 [+20.1, +29.0]` in points, or with three decimals."""
        value, low, high = (self.metric.number(part, signed=True) for part in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def metric_called(name: str) -> Metric:
    """The metric of a name; one without an entry is a plain number, and higher is better."""
    return _METRICS.get(name, Metric(name))


def is_figure(value: Any, metric: str) -> bool:
    """Whether a value of a JSON file has a figure under the name of its metric, with interval and count."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), int | float) and not isinstance(value[name], bool)
        for name in (metric, "low", "high", "count")
    )


def read_figure(row: Mapping[str, Any], metric: str) -> Figure:
    """The figure under the name of its metric in a row that holds more."""
    return Figure(row[metric], row["low"], row["high"], row["count"], metric_called(metric))


def shown(row: Figure | Difference | None) -> str:
    """A figure or difference as a table's cell; a dash for none."""
    return "–" if row is None else str(row)
