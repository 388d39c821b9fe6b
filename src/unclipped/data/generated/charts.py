"""Bar, line and pie charts of named values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from unclipped.core.errors import UsageError
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, ImageGenerator, spelled
from unclipped.data.generated.lettering import SMALLEST_FONT, letter
from unclipped.data.generated.options import ChartsOptions
from unclipped.data.generated.scene import FAINT, INK, PALETTE, Scene
from unclipped.data.generated.stencils import figure, on_circle, path, slice_of
from unclipped.data.generated.vocabulary import Split

SMALLEST_SLICE = 10  # of 100: a slice's value finds room beside it
MOST_TRIES = 20_000
NAME_GAP = 4  # px between the names of two bars
LEGEND_MARK = 14  # px of a legend's width that its swatch takes
PARTS = {"bar": "bar", "line": "point", "pie": "slice"}


@dataclass(frozen=True, slots=True)
class Chart:
    """Names, values as printed and colour names, in drawing order. A line has one colour for all its points."""

    kind: str
    names: list[str]
    values: list[str]
    colours: list[str]


@GENERATORS.register("charts")
class Charts(ImageGenerator):
    """Charts drawn from rectangles, lines and slices, on a plain background."""

    options: ChartsOptions
    kinds = ("text", "rule", "bar", "line", "point", "slice", "swatch")

    def __init__(self, options: ChartsOptions, split: Split) -> None:
        super().__init__(options, split)
        height, width = options.size
        widest = self.vocabulary.widest()
        if set(options.kinds) & {"bar", "line"}:
            pitch = (width - self._axis_width("sans") - 2) // options.bars[1]
            self.require_room("a name below the axis", widest, pitch - NAME_GAP, height // 4)
            if height < 56:
                raise UsageError(f"options.size: a chart must be at least 56 px high, found {height}; enlarge it")
        if "pie" in options.kinds:
            if width - height < 30 or height < 64:
                raise UsageError(
                    f"options.size {height}×{width}: a pie must be at least 64 px high, and 30 px wider than high for "
                    "its legend; enlarge size or leave pie out of kinds"
                )
            line = height // options.bars[1]
            self.require_room("a name in the legend", widest, width - height - LEGEND_MARK, line - 1)

    def _ticks(self) -> list[int]:
        """Numbers on the axis: fifths of the highest value; none where values stand beside their bars."""
        return [] if self.options.value_labels else [10 ** self.options.digits[1] * k // 5 for k in range(6)]

    def _axis_width(self, font: str) -> int:
        """Px at the left for the numbers on the axis."""
        return 3 + max((letter(str(tick), font, SMALLEST_FONT).width + 3 for tick in self._ticks()), default=0)

    def draft(self, dice: Dice, category: str) -> Draft:
        chart = self._chart(dice)
        scene = self.blank(dice)
        font, size = dice.pick(self.options.fonts), dice.between(self.options.font_size)
        if chart.kind == "pie":
            self._lay_pie(dice, scene, chart, font, size)
        else:
            self._lay_axes(dice, scene, chart, font, size)
        question, answer, reads, choices = getattr(self, "_" + category)(dice, chart)
        return Draft(scene, question, answer, _transcript(chart), choices, reads, {"chart": chart.kind})

    # -- content ------------------------------------------------------------------------------------------------------

    def _chart(self, dice: Dice) -> Chart:
        kind = dice.pick(self.options.kinds)
        count = dice.between(self.options.bars)
        values = self._shares(dice, count) if kind == "pie" else self._values(dice, count)
        colours = dice.several([str(name) for name in self.options.colours], count)
        if kind == "line":
            colours = colours[:1] * count
        return Chart(kind, self.words(dice, count), values, colours)

    def _values(self, dice: Dice, count: int) -> list[str]:
        """Different numbers; without value labels the largest and the smallest stand clear of the others."""
        if self.options.value_labels:
            return self.numbers(dice, count)
        clear = 10 ** self.options.digits[1] / 25
        for _ in range(MOST_TRIES):
            values = self.numbers(dice, count)
            ranked = sorted(map(int, values))
            if ranked[1] - ranked[0] >= clear and ranked[-1] - ranked[-2] >= clear:
                return values
        raise UsageError("generated:charts: no values that differ enough; lower options.bars")

    def _shares(self, dice: Dice, count: int) -> list[str]:
        """Different numbers of two digits that add up to 100 and that this split may show."""
        free = 100 - count * SMALLEST_SLICE
        for _ in range(MOST_TRIES):
            cuts = sorted(dice.below(free + 1) for _ in range(count - 1))
            edges = [0, *cuts, free]
            shares = [SMALLEST_SLICE + high - low for low, high in pairwise(edges)]
            if len(set(shares)) == count and all(self.vocabulary.allows(str(share)) for share in shares):
                return [str(share) for share in shares]
        raise UsageError(f"generated:charts: no {count} different shares; lower options.bars")

    # -- layout -------------------------------------------------------------------------------------------------------

    def _lay_axes(self, dice: Dice, scene: Scene, chart: Chart, font: str, size: int) -> None:
        """Bars or points above a base line; names below it, values above the bars or numbers on the axis."""
        options = self.options
        top_value = 10 ** options.digits[1]
        ticks, left = self._ticks(), self._axis_width("sans")
        pitch = (scene.width - left - 2) // len(chart.names)
        size = self.common_font_size([*chart.names, *chart.values], font, size, pitch - NAME_GAP, scene.height // 4)
        pitch -= dice.below(max(1, min(pitch // 4, pitch - NAME_GAP - self._widest(chart, font, size))))
        left += dice.below(scene.width - left - 1 - pitch * len(chart.names))
        names_height = size + 3
        base = scene.height - names_height - 1 - dice.below(4)
        # A line's labels stand below its low points: the zero is lifted to make room for them.
        lift = size + 4 if chart.kind == "line" and options.value_labels else 0
        room = base - lift - (size + 4 if options.value_labels else 5)  # px between zero and the highest value
        right = left + pitch * len(chart.names)
        for tick in ticks:
            y = base - round(room * tick / top_value)
            ink = letter(str(tick), "sans", SMALLEST_FONT)
            scene.fill("rule", (left, y, right, y + 1), FAINT)
            scene.write(ink, left - 3 - ink.width, max(0, y - ink.height // 2), INK, str(tick), role="tick")
        scene.fill("rule", (left, base, right, base + 1), INK)
        tops = [base - lift - max(1, round(room * int(value) / top_value)) for value in chart.values]
        centres = [left + pitch * k + pitch // 2 for k in range(len(chart.names))]
        if chart.kind == "bar":
            thickness = max(4, int(pitch * (0.5 + 0.3 * dice.random())))
            for x, y, colour, name, value in zip(centres, tops, chart.colours, chart.names, chart.values, strict=True):
                box = (x - thickness // 2, y, x - thickness // 2 + thickness, base)
                scene.fill("bar", box, PALETTE[colour], colour=colour, name=name, value=int(value))
        else:
            self._lay_line(scene, chart, centres, tops)
        above = max(letter(name, font, size).baseline for name in chart.names)
        for k, (x, y) in enumerate(zip(centres, tops, strict=True)):
            ink = letter(chart.names[k], font, size)
            scene.write(ink, x - ink.width // 2, base + 3 + above - ink.baseline, INK, chart.names[k], role="name")
            if options.value_labels:
                ink = letter(chart.values[k], font, size)
                mark = 2 if chart.kind == "bar" else 5
                # A value stands below its point when the line comes down from both sides.
                around = [tops[j] for j in (k - 1, k + 1) if 0 <= j < len(tops)]
                below = chart.kind == "line" and sum(around) / len(around) < y and y + mark + ink.height < base
                text_top = y + mark if below else y - mark - ink.height
                scene.write(ink, x - ink.width // 2, max(0, text_top), INK, chart.values[k], role="value")

    @staticmethod
    def _widest(chart: Chart, font: str, size: int) -> int:
        return max(letter(text, font, size).width for text in [*chart.names, *chart.values])

    @staticmethod
    def _lay_line(scene: Scene, chart: Chart, centres: list[int], tops: list[int]) -> None:
        colour = chart.colours[0]
        points = [(float(x), float(y)) for x, y in zip(centres, tops, strict=True)]
        mask, x, y = path(points, 1.6, scene.height, scene.width)
        scene.stamp("line", mask, x, y, PALETTE[colour], colour=colour)
        dot = figure("circle", 5)
        for (px, py), name, value in zip(points, chart.names, chart.values, strict=True):
            facts = {"colour": colour, "name": name, "value": int(value)}
            scene.stamp("point", dot, int(px) - 2, int(py) - 2, PALETTE[colour], **facts)

    def _lay_pie(self, dice: Dice, scene: Scene, chart: Chart, font: str, size: int) -> None:
        """A pie with its values around it and a legend of names at its right."""
        legend_line = min(size + 6, scene.height // len(chart.names))
        legend_width = scene.width - scene.height
        size = self.common_font_size(chart.names, font, size, legend_width - LEGEND_MARK, legend_line - 1)
        value_size = self.common_font_size(chart.values, font, size, scene.height // 4, scene.height // 4)
        border = letter("88", font, value_size).width + 3  # px around the pie that hold the values
        diameter = scene.height - 2 * border - dice.below(scene.height // 12)
        cx = border + diameter // 2 + dice.below(scene.height - 2 * border - diameter + 1)
        cy = border + diameter // 2 + dice.below(scene.height - 2 * border - diameter + 1)
        turn = dice.random()
        for name, value, colour in zip(chart.names, chart.values, chart.colours, strict=True):
            end = turn + int(value) / 100
            mask, x, y = slice_of(turn, end, diameter)
            facts = {"colour": colour, "name": name, "value": int(value)}
            scene.stamp("slice", mask, cx - diameter // 2 + x, cy - diameter // 2 + y, PALETTE[colour], **facts)
            ink = letter(value, font, value_size)
            dx, dy = on_circle((turn + end) / 2, diameter / 2 + max(ink.width, ink.height) / 2 + 2)
            x, y = cx + round(dx) - ink.width // 2, cy + round(dy) - ink.height // 2
            x, y = max(0, min(x, scene.width - ink.width)), max(0, min(y, scene.height - ink.height))
            scene.write(ink, x, y, INK, value, role="value")
            turn = end
        top = dice.below(scene.height - legend_line * len(chart.names) + 1)
        x = scene.height + 2
        for k, (name, colour) in enumerate(zip(chart.names, chart.colours, strict=True)):
            y = top + k * legend_line + legend_line // 2
            scene.fill("swatch", (x, y - 3, x + 7, y + 4), PALETTE[colour], colour=colour, name=name)
            ink = letter(name, font, size)
            x_height = letter("x", font, size).height
            text_top = max(0, min(y + 1 + x_height // 2 - ink.baseline, scene.height - ink.height))
            scene.write(ink, x + 11, text_top, INK, name, role="name")

    # -- questions: (question, answer, strings read, choices) ----------------------------------------------------------

    def _read_number(self, dice: Dice, chart: Chart) -> tuple[str, str, tuple[str, ...], None]:
        k = dice.below(len(chart.names))
        # `held_out` speaks of the number; names are held out in every val and test image.
        return self.ask(dice, "charts.value", name=chart.names[k]), chart.values[k], (chart.values[k],), None

    def _count(self, dice: Dice, chart: Chart) -> tuple[str, str, tuple[str, ...], None]:
        return self.ask(dice, "charts.count", what=PARTS[chart.kind]), str(len(chart.names)), (), None

    def _colour(self, dice: Dice, chart: Chart) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        if chart.kind == "line":
            return self.ask(dice, "charts.line_colour"), chart.colours[0], (), tuple(self.options.colours)
        k = dice.below(len(chart.names))
        question = self.ask(dice, "charts.colour_of", name=chart.names[k])
        return question, chart.colours[k], (chart.names[k],), tuple(self.options.colours)

    def _compare(self, dice: Dice, chart: Chart) -> tuple[str, str, tuple[str, ...], None]:
        form = dice.pick(("highest", "lowest"))
        ranked = sorted(range(len(chart.names)), key=lambda k: int(chart.values[k]))
        name = chart.names[ranked[-1] if form == "highest" else ranked[0]]
        return self.ask(dice, "charts." + form), name, (name,), None


def _transcript(chart: Chart) -> str:
    """`bar chart: red b a n 4 7, blue k e l 1 2`."""
    entries = [
        f"{colour} {spelled(name)} {spelled(value)}"
        for name, value, colour in zip(chart.names, chart.values, chart.colours, strict=True)
    ]
    return f"{chart.kind} chart: " + ", ".join(entries)
