"""A picture of static patterns: which keys one visual token attends to, on the grid of its page.

`python -m unclipped.attention.picture docs/images/patterns.png` draws the one of the documentation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unclipped.attention.layout import Layout
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError

SHOWN = (
    "window(24)",
    "sink(2) + window(24)",
    "window2d(2, 2)",
    "window2d(3, 1)",
    "tiles(4, 6)",
    "grid(4)",
    "grid(4, axis=row)",
    "global_text",
    "global_text + window2d(2, 2)",
)
"""Panels of the documentation's picture."""
INK = {"query": "#c0392b", "key": "#2c6fad", "later": "#e4e4e4", "other": "#f7f7f7"}


def draw_patterns(
    patterns: Sequence[str], path: str | Path, *, rows: int = 16, columns: int = 16, place: tuple[int, int] = (9, 8)
) -> None:
    """Write an SVG or PNG with a panel for each pattern: a page of rows × columns visual tokens behind four of text.

    The token at `place` (row, column) is red, the keys that it attends to are blue, later tokens, which causality
    hides, are grey. Raises UsageError for a dynamic pattern, whose choice depends on queries and keys.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    prefix = 4
    layout = Layout.from_token_types([0] * prefix + [1] * (rows * columns), [(1, rows, columns)])
    query = prefix + place[0] * columns + place[1]
    across = min(len(patterns), min((4, 3), key=lambda panels: -len(patterns) % panels))  # the fewest empty places
    down = math.ceil(len(patterns) / across)
    figure = Figure(figsize=(2.6 * across, 3.0 * down), layout="constrained")
    for index, text in enumerate(patterns):
        pattern = parse_pattern(text)
        if pattern.is_dynamic:
            raise UsageError(f"pattern {text}: chooses blocks from queries and keys, so it has no fixed picture")
        allowed = pattern.element(layout, np.array([query]), np.arange(layout.length))[0]
        axes = figure.add_subplot(down, across, index + 1)
        for token in range(layout.length):
            if token < prefix:
                corner = (2.0 * token, -2.2)
            else:
                corner = ((token - prefix) % columns, (token - prefix) // columns)
            kind = "later" if token > query else "key" if allowed[token] else "other"
            colour = INK["query" if token == query else kind]
            axes.add_patch(Rectangle(corner, 0.92, 0.92, facecolor=colour, edgecolor="#bbbbbb", linewidth=0.3))
        axes.set(xlim=(-0.3, columns + 0.3), ylim=(rows + 0.3, -2.6), aspect="equal")
        axes.set_title(text, fontsize=9)
        axes.axis("off")
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


if __name__ == "__main__":
    draw_patterns(SHOWN, sys.argv[1])
