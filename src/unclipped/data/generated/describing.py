"""Dense captions: everything that a scene's ground truth says, in words that can be read back.

Strings that stand in the image are in double quotes. Sizes and places are words for exact ranges, as numbers of pixels
would show values that are held out: `size_word` and `place_word` say which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from unclipped.data.generated.dice import Dice
from unclipped.data.generated.scene import Item, Scene
from unclipped.data.generated.stencils import FIGURES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# (least size of the next word as a share of the image's shorter side, word)
SIZE_WORDS = ((1 / 8, "tiny"), (3 / 16, "small"), (1 / 4, "medium"), (float("inf"), "large"))


def size_word(size: int, height: int, width: int) -> str:
    """tiny, small, medium or large: below 1/8, 3/16 and 1/4 of the image's shorter side, and from there on."""
    share = size / min(height, width)
    return next(word for limit, word in SIZE_WORDS if share < limit)


def place_word(box: tuple[int, int, int, int], height: int, width: int) -> str:
    """The ninth of the image that holds the centre of the box: top left, top, … middle … bottom right."""
    row = min(2, 3 * (box[1] + box[3]) // (2 * height))
    column = min(2, 3 * (box[0] + box[2]) // (2 * width))
    words = [word for word in (("top", "", "bottom")[row], ("left", "", "right")[column]) if word]
    return " ".join(words) or "middle"


def describe(dice: Dice, kind: str, scene: Scene) -> str:
    """The caption of a scene of generator `kind`; the dice choose among wordings that say the same."""
    return DESCRIPTIONS[kind](dice, scene)


def _at(place: str) -> str:
    return "in the middle" if place == "middle" else f"at the {place}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _counted(count: int, what: str) -> str:
    return f"{NUMBERS[count]} {what}" + ("" if count == 1 else "s")


def _quoted(item: Item) -> str:
    return f'"{item.facts["string"]}"'


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _shapes(dice: Dice, scene: Scene) -> str:
    items = sorted(scene.items, key=lambda item: (item.box[1], item.box[0]))  # from top to bottom
    kinds = Counter(item.kind for item in items)
    summary = _listed([_counted(kinds[kind], kind) for kind in FIGURES if kinds[kind]])
    total = _counted(len(items), "shape")
    opening = dice.pick(
        (
            f"{total}: {summary}",
            f"there {'is' if len(items) == 1 else 'are'} {total} on a plain background: {summary}",
            f"the image shows {summary}",
        )
    )
    form = dice.pick(
        (
            "a {size} {colour_kind} {place}",
            "{place} a {size} {colour_kind}",
            "{a_colour_kind}, {size}, {place}",
        )
    )
    phrases = []
    for item in items:
        size = size_word(item.facts["size"], scene.height, scene.width)
        place = _at(place_word(item.box, scene.height, scene.width))
        what = f"{item.facts['colour']} {item.kind}"
        phrases.append(form.format(size=size, colour_kind=what, a_colour_kind=_a(what), place=place))
    return f"{_sentence(opening)} {_sentence('; '.join(phrases))}"


def _characters(dice: Dice, scene: Scene) -> str:
    form = dice.pick(("the {what} {string} in {colour}", "the {colour} {what} {string}"))

    def phrase(item: Item) -> str:
        return form.format(what=item.facts["what"], string=_quoted(item), colour=item.facts["colour"])

    kinds = Counter(item.facts["what"] for item in scene.items)
    summary = _listed([_counted(kinds[what], what) for what in ("word", "number") if kinds[what]])
    if "place" in scene.items[0].facts:
        items = sorted(scene.items, key=lambda item: (item.box[1], item.box[0]))
        before = dice.chance(0.5)
        phrases = [
            f"{_at(item.facts['place'])} {phrase(item)}" if before else f"{phrase(item)} {_at(item.facts['place'])}"
            for item in items
        ]
        return f"{_sentence(summary)} {_sentence(_listed(phrases))}"
    lines: dict[int, list[Item]] = {}
    for item in scene.items:
        lines.setdefault(item.facts["line"], []).append(item)
    opening = f"{_counted(len(lines), 'line')} of text: {summary}"
    if len(lines) == 1:
        return f"{_sentence(opening)} {_sentence(_listed([phrase(item) for item in scene.items]))}"
    form_of_line = dice.pick(("line {number}: {items}", "on line {number} {items}"))
    told = [
        _sentence(form_of_line.format(number=NUMBERS[line], items=_listed([phrase(item) for item in items])))
        for line, items in lines.items()
    ]
    return " ".join([_sentence(opening), *told])


def _by_role(scene: Scene, role: str) -> list[Item]:
    return [item for item in scene.items if item.facts.get("role") == role]


def _receipts(dice: Dice, scene: Scene) -> str:
    (shop,), (date,), (total,) = (_by_role(scene, role) for role in ("shop", "date", "total"))
    (title,) = _by_role(scene, "title")
    goods = list(zip(_by_role(scene, "name"), _by_role(scene, "price"), strict=True))
    opening = dice.pick(
        (
            f"a receipt of the shop {_quoted(shop)}, dated {_quoted(date)}, with {_counted(len(goods), 'item')}",
            f"{_counted(len(goods), 'item')} on a receipt; the shop is {_quoted(shop)}, the date {_quoted(date)}",
        )
    )
    form = dice.pick(("{name} costs {price}", "{name} at {price}"))
    told = _listed([form.format(name=_quoted(name), price=_quoted(price)) for name, price in goods])
    # A caption keeps the case of the strings of the image, so no sentence begins with one that is not quoted.
    return f"{_sentence(opening)} {_sentence(told)} The line {_quoted(title)} says {_quoted(total)}."


def _tables(dice: Dice, scene: Scene) -> str:
    rules = sum(item.kind == "rule" for item in scene.items)
    style = "without rules" if rules == 0 else "with a rule below its titles" if rules == 1 else "with a grid"
    columns, rows = _by_role(scene, "column title"), _by_role(scene, "row title")
    titles = _listed([_quoted(item) for item in columns])
    opening = dice.pick(
        (
            f"a table {style}, {_counted(len(rows), 'row')} and {_counted(len(columns), 'column')}: {titles}",
            f"{_counted(len(rows), 'row')} and {_counted(len(columns), 'column')}, {titles}, in a table {style}",
        )
    )
    cells = {(item.facts["row"], item.facts["column"]): item for item in _by_role(scene, "cell")}
    named = dice.chance(0.5)
    told = []
    for row in rows:
        entries = []
        for column in columns:
            value = _quoted(cells[row.facts["row"], column.facts["column"]])
            entries.append(f"{_quoted(column)} is {value}" if named else value)
        told.append(_sentence(f"row {_quoted(row)}: {_listed(entries)}"))
    return " ".join([_sentence(opening), *told])


def _charts(dice: Dice, scene: Scene) -> str:
    parts = [item for item in scene.items if item.kind in ("bar", "point", "slice")]
    part = parts[0].kind
    chart = {"bar": "bar", "point": "line", "slice": "pie"}[part]
    line = f" on {_a(parts[0].facts['colour'] + ' line')}" if chart == "line" else ""
    opening = dice.pick(
        (
            f"a {chart} chart with {_counted(len(parts), part)}{line}",
            f"{_counted(len(parts), part)}{line} of a {chart} chart",
        )
    )
    if ticks := _by_role(scene, "tick"):
        opening += f", its axis from {_quoted(ticks[0])} to {_quoted(ticks[-1])}"
    is_printed = bool(_by_role(scene, "value"))
    form = dice.pick(("{name} is {value}{colour}", "{name} stands at {value}{colour}"))
    phrases = []
    for item in parts:
        value = f'"{item.facts["value"]}"' if is_printed else str(item.facts["value"])
        colour = "" if chart == "line" else f" in {item.facts['colour']}"
        phrases.append(form.format(name=f'"{item.facts["name"]}"', value=value, colour=colour))
    return f"{_sentence(opening)} {_sentence(_listed(phrases))}"


DESCRIPTIONS: dict[str, Callable[[Dice, Scene], str]] = {
    "shapes": _shapes,
    "characters": _characters,
    "receipts": _receipts,
    "tables": _tables,
    "charts": _charts,
}
