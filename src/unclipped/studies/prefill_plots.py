"""Plots about sparse prefill: the frontier of density against a measure, recovered mass of layers and heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from unclipped.studies.plots import ARM_COLOURS, ARM_LINES, FAINT, STYLE, bare, svg

_LOWEST = 1e-5  # of the largest value: rounding of a full pattern would take up most of a logarithmic axis
Points = Sequence[tuple[float, float]]
_PLAIN = {
    "var(--ink)": "#1d1d1b", "var(--faint)": "#63635e", "var(--rule)": "#d8d8d2", "var(--arm-0)": "#2c6fad",
    "var(--arm-1)": "#c0392b", "var(--arm-2)": "#3a8a4d", "var(--arm-3)": "#8a5aa8", "var(--arm-4)": "#b7791f",
    "var(--arm-5)": "#44798a", "var(--font)": "sans-serif",
}  # fmt: skip


def frontier_plot(
    curves: Mapping[str, Points],
    axis: str,
    *,
    narrow: bool,
    points: Mapping[str, Points] | None = None,
    bound: float | None = None,
    logarithmic: bool = False,
) -> str:
    """A measure against density: a line for each curve, single points in one faint mark with their names.

    bound: a dotted line. logarithmic: the measure, as far as it is above zero.
    """
    from matplotlib import rc_context, ticker
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.3) if narrow else (8.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for number, (name, line) in enumerate(curves.items()):
            ordered = sorted(line)
            axes.plot(
                [x for x, _ in ordered], [y for _, y in ordered], label=name, linewidth=1.7, marker="o", markersize=4,
                color=ARM_COLOURS[number % len(ARM_COLOURS)], linestyle=ARM_LINES[number % len(ARM_LINES)],
            )  # fmt: skip
        for name, marks in (points or {}).items():
            for x, y in marks:
                axes.plot(x, y, marker="D", markersize=4, color=FAINT, linestyle="")
                if name:
                    axes.annotate(name, (x, y), (5, 3), textcoords="offset points", size=7, color=FAINT)
        if bound is not None:
            axes.axhline(bound, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
        drawn = [y for line in [*curves.values(), *(points or {}).values()] for _, y in line]
        if logarithmic and any(y > 0 for y in drawn):
            axes.set_yscale("log", nonpositive="mask")
            axes.set_ylim(bottom=max(min(y for y in drawn if y > 0), max(drawn) * _LOWEST) / 2)
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("density: attended pairs over all that causal attention has")
        axes.set_ylabel(axis)
        axes.grid(axis="y", linewidth=0.6)
        bare(axes)
        if len(curves) > 1:
            figure.legend(
                *axes.get_legend_handles_labels(), loc="outside upper left", ncols=2 if narrow else 4, frameon=False,
                fontsize=9,
            )  # fmt: skip
        salt = f"{re.sub(r'[^a-z]+', '-', axis.lower())}-{'narrow' if narrow else 'wide'}"
        names = ", ".join([*curves, *(points or {})])
        return svg(figure, salt, f"{axis} against density: {names}")


def heads_plot(values: Sequence[Sequence[float]], title: str, *, narrow: bool) -> str:
    """Recovered mass as a field of squares, layers down and query heads across; full ink is 1. values: (layers, H)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, heads = len(values), len(values[0])
    width = 4.4 if narrow else 8.2
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 0.9 + min(0.24, 0.8 * width / heads) * layers), layout="constrained")
        axes = figure.subplots()
        for layer, row in enumerate(values):
            for head, value in enumerate(row):
                axes.add_patch(
                    Rectangle((head, layer), 0.94, 0.94, facecolor=ARM_COLOURS[0], alpha=max(0.0, min(1.0, value)))
                )
        axes.set(xlim=(0, heads), ylim=(layers, 0), xlabel="query head", ylabel="layer")
        for count, set_ticks in ((layers, axes.set_yticks), (heads, axes.set_xticks)):
            shown = range(0, count, max(1, count // 8))
            set_ticks([place + 0.5 for place in shown], [str(place) for place in shown])
        bare(axes)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        salt = f"heads-{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{'narrow' if narrow else 'wide'}"
        low = min(min(row) for row in values)
        return svg(figure, salt, f"Recovered mass under {title}, layers by heads; the least is {low:.2f}")


def standalone(picture: str) -> str:
    """A plot of a page as a file of its own: the page's colours and font written out."""
    for variable, value in _PLAIN.items():
        picture = picture.replace(variable, value)
    if "xmlns=" not in picture:
        picture = picture.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + picture
