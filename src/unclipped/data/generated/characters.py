"""Words and numbers in one or more lines: reading at its simplest."""

from __future__ import annotations

from collections.abc import Sequence

from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, ImageGenerator, distinct, place, spelled
from unclipped.data.generated.lettering import SMALLEST_FONT, fit, letter
from unclipped.data.generated.options import CharactersOptions
from unclipped.data.generated.phrasing import ORDINALS
from unclipped.data.generated.scene import PALETTE, Item, Scene
from unclipped.data.generated.vocabulary import Split

# What an item is before it has a place: (kind "word"/"number", string, colour name)
Plan = tuple[str, str, str]


@GENERATORS.register("characters")
class Characters(ImageGenerator):
    """Lines of words and numbers. Raises UsageError at once when the largest scene would not fit the image."""

    options: CharactersOptions
    kinds = ("text",)

    def __init__(self, options: CharactersOptions, split: Split) -> None:
        super().__init__(options, split)
        self._most_lines, self._most_items = options.lines[1], options.items[1]
        self._single = self._most_lines * self._most_items == 1
        height, width = options.size
        self._halves = height < 2 * 1.6 * options.font_size[0]  # too low for an upper and a lower half
        self._check_room(height, width)

    def _check_room(self, height: int, width: int) -> None:
        """What fits in the smallest type always fits: `require_room` is given the widest strings on every place."""
        tasks, widest = self.options.tasks, self.vocabulary.widest()
        items = max(self._most_items, 2 if tasks.get("compare", 0) > 0 and self._most_lines == 1 else 1)
        gaps = (items - 1) * _gap(SMALLEST_FONT)
        leading = (self._most_lines - 1) * _leading(SMALLEST_FONT)
        self.require_room("an item", widest, (width - gaps) // items, (height - leading) // self._most_lines)
        if tasks.get("locate", 0) > 0:
            self.require_room("an item in its part", widest, width // 2 - 1, height if self._halves else height // 2)

    # -- content ------------------------------------------------------------------------------------------------------

    def _kinds(self, dice: Dice, count: int) -> list[str]:
        return [dice.pick(("word", "number")) for _ in range(count)]

    def _plans(self, dice: Dice, kinds: Sequence[str]) -> list[Plan]:
        """Different strings of the given kinds, colours at random."""
        plans: list[Plan] = []
        for kind in kinds:
            draw = self.vocabulary.word if kind == "word" else self.vocabulary.number
            text = distinct(lambda draw=draw: draw(dice), [plan[1] for plan in plans], kind + "s")
            plans.append((kind, text, dice.pick(self.options.colours)))
        return plans

    def _shape(self, dice: Dice) -> list[int]:
        """Items on each line."""
        return [dice.between(self.options.items) for _ in range(dice.between(self.options.lines))]

    # -- layout -------------------------------------------------------------------------------------------------------

    def _lay_lines(self, dice: Dice, shape: Sequence[int], plans: Sequence[Plan]) -> Scene:
        """Lines from the top, each with a free left edge; the block as a whole stands anywhere it fits."""
        scene = self.blank(dice)
        font, size = dice.pick(self.options.fonts), dice.between(self.options.font_size)
        while True:
            inks = [letter(text, font, size) for _, text, _ in plans]
            widths, heights, start = [], [], 0
            for count in shape:
                line = inks[start : start + count]
                widths.append(sum(ink.width for ink in line) + (count - 1) * _gap(size))
                above = max(ink.baseline for ink in line)
                heights.append((above, above + max(ink.height - ink.baseline for ink in line)))
                start += count
            used = sum(height for _, height in heights) + (len(shape) - 1) * _leading(size)
            if size == SMALLEST_FONT or (max(widths) <= scene.width and used <= scene.height):
                break
            size -= 1
        y = place(dice, used, scene.height)
        start = 0
        for line, count in enumerate(shape):
            x = place(dice, widths[line], scene.width)
            above, height = heights[line]
            for position in range(count):
                ink, (kind, text, colour) = inks[start + position], plans[start + position]
                facts = {"what": kind, "colour": colour, "line": line + 1, "position": position + 1}
                facts |= {"font": font, "font_size": size}
                scene.write(ink, x, y + above - ink.baseline, PALETTE[colour], text, **facts)
                x += ink.width + _gap(size)
            y += height + _leading(size)
            start += count
        return scene

    def _places(self) -> tuple[str, ...]:
        return ("left", "right") if self._halves else ("top left", "top right", "bottom left", "bottom right")

    def _lay_places(self, dice: Dice, plans: Sequence[Plan]) -> Scene:
        """Each item alone inside one half or quarter of the image."""
        scene = self.blank(dice)
        font, size = dice.pick(self.options.fonts), dice.between(self.options.font_size)
        places = dice.several(self._places(), len(plans))
        half_width, height = scene.width // 2, scene.height if self._halves else scene.height // 2
        for (kind, text, colour), where in zip(plans, places, strict=True):
            fitted = fit(text, font, size, half_width - 1, height)
            ink, px = fitted if fitted is not None else (letter(text, font, SMALLEST_FONT), SMALLEST_FONT)
            x = place(dice, ink.width, half_width) + (scene.width - half_width if "right" in where else 0)
            y = place(dice, ink.height, height) + (scene.height - height if "bottom" in where else 0)
            facts = {"what": kind, "colour": colour, "place": where, "font": font, "font_size": px}
            scene.write(ink, x, y, PALETTE[colour], text, **facts)
        return scene

    # -- questions ----------------------------------------------------------------------------------------------------

    def draft(self, dice: Dice, category: str) -> Draft:
        return getattr(self, "_" + category)(dice)

    def _ask(self, dice: Dice, form: str, **fields: object) -> str:
        return self.ask(dice, "characters." + form, **fields)

    def _read_number(self, dice: Dice) -> Draft:
        return self._read(dice, "number")

    def _read_text(self, dice: Dice) -> Draft:
        return self._read(dice, "word")

    def _read(self, dice: Dice, kind: str) -> Draft:
        """One item of the kind; where there are more, the one whose colour no other of its kind has."""
        shape = self._shape(dice)
        target = dice.below(sum(shape))
        kinds = self._kinds(dice, sum(shape))
        kinds[target] = kind
        plans = self._plans(dice, kinds)
        _, text, colour = plans[target]
        others = [colour_name for colour_name in self.options.colours if colour_name != colour]
        plans = [
            plan if i == target or plan[0] != kind or plan[2] != colour else (plan[0], plan[1], dice.pick(others))
            for i, plan in enumerate(plans)
        ]
        form = kind if kinds.count(kind) == 1 else kind + "_by_colour"
        question = self._ask(dice, form, colour=colour)
        return _draft(self._lay_lines(dice, shape, plans), question, text, reads=(text,))

    def _read_kth(self, dice: Dice) -> Draft:
        if self._single:
            return self._kth_glyph(dice)
        shape = self._shape(dice)
        line = dice.below(len(shape))
        k = dice.below(shape[line])
        start = sum(shape[:line])
        kinds = self._kinds(dice, sum(shape))
        plans = self._plans(dice, kinds)
        on_line = set(kinds[start : start + shape[line]])
        form = "kth_" + on_line.pop() if len(on_line) == 1 else "kth_item"
        question = self._ask(dice, form, line=line + 1, k=k + 1, kth=ORDINALS[k])
        text = plans[start + k][1]
        return _draft(self._lay_lines(dice, shape, plans), question, text, reads=(text,))

    def _kth_glyph(self, dice: Dice) -> Draft:
        ((kind, text, colour),) = self._plans(dice, self._kinds(dice, 1))
        k = dice.below(len(text))
        what = "letter" if kind == "word" else "digit"
        question = self._ask(dice, "kth_glyph", what=what, k=k + 1, kth=ORDINALS[k] if k < 9 else f"{k + 1}th")
        return _draft(self._lay_lines(dice, [1], [(kind, text, colour)]), question, text[k], reads=(text,))

    def _count(self, dice: Dice) -> Draft:
        if self._single:
            return self._count_glyphs(dice)
        # The number of the asked kind is drawn first, so that all counts are equally likely as far as room allows.
        shape = self._shape(dice)
        total = sum(shape)
        what = dice.pick(("word", "number"))
        count = dice.below(total + 1)
        other = "number" if what == "word" else "word"
        kinds = dice.mixed([what] * count + [other] * (total - count))
        question = self._ask(dice, "count_items", what=what)
        return _draft(self._lay_lines(dice, shape, self._plans(dice, kinds)), question, str(count))

    def _count_glyphs(self, dice: Dice) -> Draft:
        options = self.options
        lengths = {(n, "word") for n in range(options.word_length[0], min(options.word_length[1], 9) + 1)}
        lengths |= {(n, "number") for n in range(options.digits[0], options.digits[1] + 1)}
        if options.words == "english":
            lengths = {(n, kind) for n, kind in lengths if kind == "number"} | {(0, "word")}
        count = dice.pick(sorted({n for n, _ in lengths}))
        kind = dice.pick(sorted(kind for n, kind in lengths if n == count))
        if kind == "word":
            text = self.vocabulary.word(dice, count or None)
        else:
            text = self.vocabulary.number(dice, count)
        plan = (kind, text, dice.pick(options.colours))
        return _draft(self._lay_lines(dice, [1], [plan]), self._ask(dice, "count_glyphs"), str(len(text)))

    def _colour(self, dice: Dice) -> Draft:
        shape = self._shape(dice)
        plans = self._plans(dice, self._kinds(dice, sum(shape)))
        _, text, colour = dice.pick(plans)
        many = len(plans) > 1
        question = self._ask(dice, "colour_of", string=text) if many else self._ask(dice, "colour")
        scene = self._lay_lines(dice, shape, plans)
        return _draft(scene, question, colour, choices=self.options.colours, reads=(text,) if many else ())

    def _compare(self, dice: Dice) -> Draft:
        """Two numbers, different in value, on one line or on two."""
        plans = self._plans(dice, ["number", "number"])
        shape = [1, 1] if self._most_lines > 1 and dice.chance(0.5) else [2]
        form = dice.pick(("larger", "smaller"))
        values = sorted((text for _, text, _ in plans), key=int)
        answer = values[-1] if form == "larger" else values[0]
        question = self._ask(dice, form)
        scene = self._lay_lines(dice, shape, plans)
        return _draft(scene, question, answer, choices=tuple(plan[1] for plan in plans), reads=tuple(values))

    def _locate(self, dice: Dice) -> Draft:
        most = min(len(self._places()), self._most_lines * self._most_items)
        plans = self._plans(dice, self._kinds(dice, dice.between((1, most))))
        target = dice.below(len(plans))
        text = plans[target][1]
        many = len(plans) > 1
        question = self._ask(dice, "where_is", string=text) if many else self._ask(dice, "where")
        scene = self._lay_places(dice, plans)
        place = scene.items[target].facts["place"]
        return _draft(scene, question, place, choices=self._places(), reads=(text,) if many else ())


def _gap(size: int) -> int:
    return max(3, size // 2)


def _leading(size: int) -> int:
    return max(1, size // 4)


def _draft(
    scene: Scene, question: str, answer: str, *, choices: tuple[str, ...] | None = None, reads: tuple[str, ...] = ()
) -> Draft:
    return Draft(scene, question, answer, _transcript(scene.items), choices, reads)


def _transcript(items: Sequence[Item]) -> str:
    """`red 4 7, blue b a n / black 1 2`: items in reading order, lines parted by strokes."""
    if any("place" in item.facts for item in items):
        ordered = sorted(items, key=lambda item: ("bottom" in item.facts["place"], "right" in item.facts["place"]))
        return ", ".join(
            f"{item.facts['place']} {item.facts['colour']} {spelled(item.facts['string'])}" for item in ordered
        )
    lines: dict[int, list[str]] = {}
    for item in items:
        lines.setdefault(item.facts["line"], []).append(f"{item.facts['colour']} {spelled(item.facts['string'])}")
    return " / ".join(", ".join(line) for line in lines.values())
