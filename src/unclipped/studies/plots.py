"""Plots of a report as inline SVG that follows the page: its font, and its colours in light and dark mode.

Matplotlib writes plain colours; each colour used here is a stand-in that is replaced by a CSS variable of the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unclipped.evaluation.figures import Difference, Figure, Metric
from unclipped.studies.page import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


INK, FAINT, GRID = "#010101", "#020202", "#030303"
ARM_COLOURS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
ARM_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
ARM_MARKS = ("o", "s", "^", "D", "v", "P")
ARM_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--rule)"} | {
    colour: f"var(--arm-{number})" for number, colour in enumerate(ARM_COLOURS)
}
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a `$` in a category is a `$`
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "hatch.linewidth": 0.8,
}
_POINTS_A_CURVE = 300


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


def both(draw: Any, *arguments: Any, caption: str = "", title: str = "", **options: Any) -> Plot:
    """A plot for wide and for narrow screens."""
    wide, narrow = (draw(*arguments, **options, narrow=is_narrow) for is_narrow in (False, True))
    return Plot(wide, narrow, caption, title)


def svg(figure: Drawing, salt: str, description: str) -> str:
    """The figure as an `<svg>` element with a text alternative; `salt` keeps the ids of several figures apart."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # The page's font takes the place of the one that the text was measured with.
    text = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Ids of groups mean nothing to the page and would stand twice when it holds several plots.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    )
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def bare(axes: Axes) -> None:
    """Take off the upper and right border and the ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average of about `span` values, without a pull towards the start."""
    keep, total, weight, out = 1.0 - 2.0 / (span + 1.0), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append(total / weight)
    return out


def joined_curve(rows: Sequence[Mapping[str, Any]], key: str = "loss") -> tuple[list[int], list[float], list[tuple]]:
    """Rows of a run's metrics.jsonl as one curve: steps counted on through the stages, values, [(stage, first, last)].

    `step` counts within a stage; a stage begins where the last logged step of the one before ended. Stages are told
    apart by `stage_index` and `stage`. Rows without `key` are left out.
    """
    steps: list[int] = []
    values: list[float] = []
    stages: list[tuple[str, int, int]] = []
    current: tuple[Any, str] | None = None
    for row in rows:
        if key not in row or "step" not in row:
            continue
        stage = (row.get("stage_index"), str(row.get("stage", "")))
        if stage != current:
            current = stage
            stages.append((stage[1], steps[-1] if steps else 0, 0))
        name, start, _ = stages[-1]
        steps.append(start + int(row["step"]))
        values.append(float(row[key]))
        stages[-1] = (name, start, steps[-1])
    return steps, values, stages


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str], *, narrow: bool) -> str:
    """Loss against step, one line an arm (colour and dashes), stage boundaries as vertical lines."""
    from matplotlib import rc_context, ticker
    from matplotlib.figure import Figure as Drawing

    with rc_context(STYLE):
        figure = Drawing(figsize=(4.4, 3.3) if narrow else (8.2, 3.5), layout="constrained")
        axes = figure.subplots()
        drawn: list[float] = []
        marks: list[tuple[str, int, int]] = []
        for number, (arm, rows) in enumerate(curves.items()):
            steps, values, stages = joined_curve(rows)
            if not steps:
                continue
            marks = max(marks, stages, key=len)
            colour = ARM_COLOURS[number % len(ARM_COLOURS)]
            stride = max(1, len(steps) // _POINTS_A_CURVE)
            smooth = smoothed(values, max(3, len(values) // 40))
            axes.plot(steps[::stride], values[::stride], color=colour, alpha=0.22, linewidth=0.8)
            line = ARM_LINES[number % len(ARM_LINES)]
            axes.plot(
                steps[::stride],
                smooth[::stride],
                color=colour,
                linewidth=1.8,
                linestyle=line,
                label=labels.get(arm, arm),
            )
            drawn += smooth
        if drawn and min(drawn) > 0 and max(drawn) / min(drawn) > 20:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        for name, first, last in marks if len(marks) > 1 else ():
            if first:
                axes.axvline(first, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
            wide_enough = (last - first) / max(1, marks[-1][2]) > (0.16 if narrow else 0.08)
            if wide_enough:
                axes.text(
                    (first + last) / 2,
                    1.02,
                    name,
                    transform=axes.get_xaxis_transform(),
                    ha="center",
                    color=FAINT,
                    size=9,
                )
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.grid(axis="y", linewidth=0.6)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if narrow else 8, integer=True))
        bare(axes)
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=1 if narrow else 3,
            frameon=False,
            fontsize=9,
        )
        size = "narrow" if narrow else "wide"
        return svg(
            figure, f"loss-{size}", f"Training loss against step for {', '.join(labels.get(a, a) for a in curves)}"
        )


def line_plot(plot: LinePlot, *, narrow: bool) -> str:
    """Values against step, a line each (colour and dashes); values above zero that span more than a decade on a
    logarithmic axis. Values that are not finite are left out."""
    from matplotlib import rc_context, ticker
    from matplotlib.figure import Figure as Drawing

    with rc_context(STYLE):
        figure = Drawing(figsize=(4.4, 2.6) if narrow else (8.2, 2.6), layout="constrained")
        axes = figure.subplots()
        drawn: list[float] = []
        for number, (name, points) in enumerate(plot.lines.items()):
            finite = [(step, value) for step, value in points if math.isfinite(value)]
            stride = max(1, len(finite) // _POINTS_A_CURVE)
            steps, values = [step for step, _ in finite[::stride]], [value for _, value in finite[::stride]]
            drawn += values
            axes.plot(
                steps,
                values,
                color=ARM_COLOURS[number % len(ARM_COLOURS)],
                linestyle=ARM_LINES[number % len(ARM_LINES)],
                linewidth=1.6,
                marker="o" if len(steps) < 40 else "",
                markersize=3,
                label=name,
            )
        if not plot.is_linear and drawn and min(drawn) > 0 and max(drawn) / min(drawn) > 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        elif drawn and min(drawn) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(plot.axis)
        axes.grid(axis="y", linewidth=0.6)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if narrow else 8, integer=True))
        bare(axes)
        if len(plot.lines) > 1:
            handles, names = axes.get_legend_handles_labels()
            figure.legend(handles, names, loc="outside upper left", ncols=2 if narrow else 4, frameon=False, fontsize=9)
        salt = f"{re.sub(r'[^a-z]+', '-', plot.title.lower())}-{'narrow' if narrow else 'wide'}"
        return svg(figure, salt, f"{plot.title}: {', '.join(plot.lines)} against step")


def forest_plot(title: str, rows: Mapping[str, Figure], *, narrow: bool) -> str:
    """One figure an arm, a point with its interval, arms from top to bottom."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    with rc_context(STYLE):
        figure = Drawing(figsize=(4.4 if narrow else 8.2, 0.7 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows.values()):
            scale = row.metric.scale
            axes.plot([scale * row.low, scale * row.high], [place, place], color=ARM_COLOURS[0], linewidth=1.6)
            axes.plot(scale * row.value, place, marker="o", markersize=5, color=ARM_COLOURS[0])
            axes.annotate(
                row.shown, (scale * row.high, place), (5, 0), textcoords="offset points", va="center", size=8,
                color=FAINT,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
        axes.invert_yaxis()
        whole = max((row.metric.scale for row in rows.values()), default=1.0)
        highest = max((row.metric.scale * row.high for row in rows.values()), default=whole)
        axes.set_xlim(0, min(1.08 * whole, 1.15 * highest) or whole)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        bare(axes)
        axes.spines["bottom"].set_visible(False)
        salt = f"{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{'narrow' if narrow else 'wide'}"
        return svg(figure, salt, f"{title}: a point with its interval for {', '.join(rows)}")


def difference_plot(
    title: str,
    differences: Mapping[str, Mapping[str, Difference]],
    axis: str,
    *,
    narrow: bool,
) -> str:
    """Differences with their intervals about a line at zero: a block a row, in it a point a run (colour and mark).

    differences: {run: {row: difference}}; `axis` says what they are.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    rows = list(dict.fromkeys(name for found in differences.values() for name in found))
    step = 0.7 / len(differences)
    with rc_context(STYLE):
        height = 0.9 + len(rows) * (0.14 + 0.17 * len(differences))
        figure = Drawing(figsize=(4.4 if narrow else 8.2, height), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0.0, color=INK, linewidth=0.9)
        for number, (run, found) in enumerate(differences.items()):
            colour, mark = ARM_COLOURS[number % len(ARM_COLOURS)], ARM_MARKS[number % len(ARM_MARKS)]
            for name, row in found.items():
                place = rows.index(name) - 0.35 + step * (number + 0.5)
                low, value, high = (row.metric.scale * part for part in (row.low, row.value, row.high))
                axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
                label = run if name == next(iter(found)) else None
                axes.plot(value, place, marker=mark, markersize=5, color=colour, linestyle="", label=label)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(axis)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        bare(axes)
        axes.spines["bottom"].set_visible(False)
        if len(differences) > 1:
            handles, names = axes.get_legend_handles_labels()
            figure.legend(handles, names, loc="outside upper left", ncols=2 if narrow else 4, frameon=False, fontsize=9)
        salt = f"differences-{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{'narrow' if narrow else 'wide'}"
        return svg(
            figure, salt, f"{title}: {axis} with intervals, for {', '.join(differences)}; the table has the same"
        )


def bar_plot(
    arms: Mapping[str, Mapping[str, Figure]],
    metric: Metric,
    labels: Mapping[str, str],
    *,
    narrow: bool,
) -> str:
    """Horizontal bars with interval whiskers: a block a category, a bar an arm (colour, hatch and order).

    arms: {arm: {category: figure of this metric}}.
    """
    from matplotlib import colors, rc_context
    from matplotlib.figure import Figure as Drawing

    as_percent, scale = metric.is_percent, metric.scale
    categories = list(dict.fromkeys(name for rows in arms.values() for name in rows))
    thickness = 0.8 / len(arms)
    height = 0.75 + len(categories) * (0.16 + 0.19 * len(arms))
    with rc_context(STYLE):
        figure = Drawing(figsize=(4.4 if narrow else 8.2, height), layout="constrained")
        axes = figure.subplots()
        largest = 0.0
        for number, (arm, rows) in enumerate(arms.items()):
            places = [place for place, name in enumerate(categories) if name in rows]
            found = [rows[categories[place]] for place in places]
            values = [scale * row.value for row in found]
            lows, highs = [scale * row.low for row in found], [scale * row.high for row in found]
            middles = [place - 0.4 + thickness * (number + 0.5) for place in places]
            colour = ARM_COLOURS[number % len(ARM_COLOURS)]
            axes.barh(
                middles, values, height=thickness * 0.86, label=labels.get(arm, arm), linewidth=0.8, edgecolor=colour,
                facecolor=(*colors.to_rgb(colour), 1.0) if not number else "none",
                hatch=ARM_HATCHES[number % len(ARM_HATCHES)],
            )  # fmt: skip
            whiskers = [
                [max(0.0, value - low) for value, low in zip(values, lows, strict=True)],
                [max(0.0, high - value) for value, high in zip(values, highs, strict=True)],
            ]
            axes.errorbar(values, middles, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1.0, capsize=2)
            for value, high, middle in zip(values, highs, middles, strict=True):
                text = f"{value:.0f}" if as_percent else f"{value:.3f}"
                axes.annotate(
                    text, (high, middle), (4, 0), textcoords="offset points", va="center", size=8, color=FAINT
                )
            largest = max([largest, *highs])
        axes.set_yticks(range(len(categories)), categories)
        axes.invert_yaxis()
        axes.set_xlim(0, 108 if as_percent else max(1e-9, largest) * 1.15)
        if as_percent:
            axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel(f"{metric.title}{' (%)' if as_percent else ''}")
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        bare(axes)
        axes.spines["bottom"].set_visible(False)
        if len(arms) > 1:
            figure.legend(
                *axes.get_legend_handles_labels(),
                loc="outside upper left",
                ncols=1 if narrow else 3,
                frameon=False,
                fontsize=9,
            )
        size = "narrow" if narrow else "wide"
        title = f"{metric.title} per category with intervals; the table has the same figures"
        return svg(figure, f"bars-{metric.name}-{size}", title)
