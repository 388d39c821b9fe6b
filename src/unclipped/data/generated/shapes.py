"""Circles, squares and triangles: counting, colours, sizes and places without reading."""

from __future__ import annotations

from collections.abc import Sequence

from unclipped.core.errors import UsageError
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, ImageGenerator
from unclipped.data.generated.options import ShapesOptions
from unclipped.data.generated.scene import PALETTE, Scene
from unclipped.data.generated.stencils import FIGURES, figure

PLACES = ("top left", "top right", "bottom left", "bottom right")
SMALLEST = 4  # px
MOST_TRIES = 200
# A triangle 1.6 times as high as a square still has the larger area, so "largest" has one meaning.
CLEARLY = 1.6

# (figure, colour name)
Plan = tuple[str, str]


@GENERATORS.register("shapes")
class Shapes(ImageGenerator):
    """Figures that do not touch, on a plain background."""

    options: ShapesOptions
    kinds = FIGURES

    def draft(self, dice: Dice, category: str) -> Draft:
        return getattr(self, "_" + category)(dice)

    def _total(self, dice: Dice, least: int = 1) -> int:
        low, high = self.options.count
        return dice.between((max(low, least), max(high, least)))

    def _plans(self, dice: Dice, count: int) -> list[Plan]:
        return [(dice.pick(FIGURES), dice.pick(self.options.colours)) for _ in range(count)]

    # -- layout -------------------------------------------------------------------------------------------------------

    def _lay(self, dice: Dice, plans: Sequence[Plan], sizes: Sequence[int], quadrant: tuple[int, str] | None) -> Scene:
        """Figures at random places, none nearer than 2 px; figure quadrant[0] stays inside the named quarter."""
        scene = self.blank(dice)
        sizes = list(sizes)
        while True:
            boxes = self._boxes(dice, scene, sizes, quadrant)
            if boxes is not None:
                break
            if max(sizes) <= SMALLEST:
                raise UsageError("generated:shapes: the shapes find no room; enlarge options.size or lower count")
            sizes = [max(SMALLEST, int(size * 0.9)) for size in sizes]
        ranks = {size: rank + 1 for rank, size in enumerate(sorted(set(sizes)))}
        for (kind, colour), size, (x, y) in zip(plans, sizes, boxes, strict=True):
            upper, lefter = 2 * y + size < scene.height, 2 * x + size < scene.width
            place = f"{'top' if upper else 'bottom'} {'left' if lefter else 'right'}"
            facts = {"colour": colour, "size": size, "rank": ranks[size], "place": place}
            scene.stamp(kind, figure(kind, size), x, y, PALETTE[colour], **facts)
        return scene

    def _boxes(
        self, dice: Dice, scene: Scene, sizes: Sequence[int], quadrant: tuple[int, str] | None
    ) -> list[tuple[int, int]] | None:
        placed: dict[int, tuple[int, int]] = {}
        # The one bound to a quarter goes first, then the large ones: they find room while there is some.
        order = sorted(range(len(sizes)), key=lambda i: (quadrant is None or i != quadrant[0], -sizes[i]))
        for i in order:
            size = sizes[i]
            for _ in range(40):
                x, y = dice.below(scene.width - size + 1), dice.below(scene.height - size + 1)
                if quadrant is not None and i == quadrant[0]:
                    half_width, half_height = scene.width // 2, scene.height // 2
                    x = dice.below(half_width - size + 1) + (scene.width - half_width) * ("right" in quadrant[1])
                    y = dice.below(half_height - size + 1) + (scene.height - half_height) * ("bottom" in quadrant[1])
                if all(
                    x >= other_x + sizes[j] + 2
                    or other_x >= x + size + 2
                    or y >= other_y + sizes[j] + 2
                    or other_y >= y + size + 2
                    for j, (other_x, other_y) in placed.items()
                ):
                    placed[i] = (x, y)
                    break
            else:
                return None
        return [placed[i] for i in range(len(sizes))]

    def _sizes(self, dice: Dice, count: int) -> list[int]:
        return [dice.between(self.options.shape_size) for _ in range(count)]

    # -- questions ----------------------------------------------------------------------------------------------------

    def _count(self, dice: Dice) -> Draft:
        total = self._total(dice)
        plans = self._plans(dice, total)
        form = dice.pick(("all", "figure", "colour"))
        if form == "all":
            question, answer = self.ask(dice, "shapes.count"), total
        else:
            # The answer is drawn first: every count from none to all is equally likely.
            answer = dice.below(total + 1)
            index = 0 if form == "figure" else 1
            names = FIGURES if form == "figure" else self.options.colours
            wanted = dice.pick(names)
            others = [name for name in names if name != wanted]
            chosen = set(dice.several(range(total), answer))
            plans = [
                _with(
                    plan, index, wanted if i in chosen else plan[index] if plan[index] != wanted else dice.pick(others)
                )
                for i, plan in enumerate(plans)
            ]
            question = self.ask(dice, "shapes.count_of", what=f"{wanted}s" if form == "figure" else f"{wanted} shapes")
        return _draft(self._lay(dice, plans, self._sizes(dice, total), None), question, str(answer))

    def _colour(self, dice: Dice) -> Draft:
        total = self._total(dice)
        plans = self._plans(dice, total)
        wanted, colour = plans[0]
        others = [name for name in FIGURES if name != wanted]
        plans = [plans[0]] + [(name if name != wanted else dice.pick(others), tint) for name, tint in plans[1:]]
        question = self.ask(dice, "shapes.colour_of", shape=wanted) if total > 1 else self.ask(dice, "shapes.colour")
        scene = self._lay(dice, plans, self._sizes(dice, total), None)
        return _draft(scene, question, colour, choices=self.options.colours)

    def _compare(self, dice: Dice) -> Draft:
        total = self._total(dice, least=2)
        plans = self._plans(dice, total)
        low, high = self.options.shape_size
        form = dice.pick(("largest", "smallest"))
        for _ in range(MOST_TRIES):
            if form == "largest":
                others = [dice.between((low, int(high / CLEARLY))) for _ in range(total - 1)]
                size = dice.between((min(high, int(CLEARLY * max(others)) + 1), high))
            else:
                others = [dice.between((int(CLEARLY * low) + 1, high)) for _ in range(total - 1)]
                size = dice.between((low, max(low, int(min(others) / CLEARLY))))
            scene = self._lay(dice, plans, [size, *others], None)
            drawn = [item.facts["size"] for item in scene.items]
            rest = drawn[1:]
            # Shapes drawn smaller for want of room may have come too close in size.
            if drawn[0] >= CLEARLY * max(rest) if form == "largest" else min(rest) >= CLEARLY * drawn[0]:
                kind, colour = plans[0]
                return _draft(scene, self.ask(dice, "shapes." + form), f"{colour} {kind}")
        raise UsageError("generated:shapes: no room for sizes that differ; enlarge options.size or lower count")

    def _locate(self, dice: Dice) -> Draft:
        total = self._total(dice)
        plans = self._plans(dice, total)
        while plans.count(plans[0]) > 1:
            plans = [plans[0]] + [
                (dice.pick(FIGURES), dice.pick(self.options.colours)) if plan == plans[0] else plan
                for plan in plans[1:]
            ]
        place = dice.pick(PLACES)
        kind, colour = plans[0]
        question = self.ask(dice, "shapes.where", shape=f"{colour} {kind}")
        scene = self._lay(dice, plans, self._sizes(dice, total), (0, place))
        return _draft(scene, question, place, choices=PLACES)


def _with(plan: Plan, index: int, value: str) -> Plan:
    return (value, plan[1]) if index == 0 else (plan[0], value)


def _draft(scene: Scene, question: str, answer: str, *, choices: tuple[str, ...] | None = None) -> Draft:
    ordered = sorted(scene.items, key=lambda item: (item.box[1], item.box[0]))
    # Sizes as ranks from the smallest: one digit each, so that no transcript shows a number that is held out.
    transcript = ", ".join(
        f"{item.facts['colour']} {item.kind} size {item.facts['rank']} {item.facts['place']}" for item in ordered
    )
    return Draft(scene, question, answer, transcript, choices)
