"""A needle in a grid: a page tiled with words, and one number in one of its cells, whose place is swept."""

from __future__ import annotations

from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, ImageGenerator, place, spelled
from unclipped.data.generated.lettering import SMALLEST_FONT, fit, letter
from unclipped.data.generated.options import NeedleOptions, cells_of_third
from unclipped.data.generated.scene import INK
from unclipped.data.generated.vocabulary import Split


@GENERATORS.register("needle")
class Needle(ImageGenerator):
    """Words in all cells but one; the answer is the number there. Raises UsageError when text would not fit a cell."""

    options: NeedleOptions

    def __init__(self, options: NeedleOptions, split: Split) -> None:
        super().__init__(options, split)
        height, width = options.size
        rows, columns = options.cells
        self.cell = (height // rows, width // columns)
        self.require_room("a cell", self.vocabulary.widest(), self.cell[1] - 2, self.cell[0] - 2)

    def draft(self, dice: Dice, category: str) -> Draft:
        options, scene = self.options, self.blank(dice)
        rows, columns = options.cells
        vertical, horizontal = category.split()
        target = (dice.pick(cells_of_third(vertical, rows)), dice.pick(cells_of_third(horizontal, columns)))
        font, size = dice.pick(options.fonts), dice.between(options.font_size)
        number = self.vocabulary.number(dice)
        lines: list[list[str]] = []
        for row in range(rows):
            lines.append([])
            for column in range(columns):
                is_needle = (row, column) == target
                text = number if is_needle else self.vocabulary.word(dice)
                fitted = fit(text, font, size, self.cell[1] - 2, self.cell[0] - 2)
                ink = fitted[0] if fitted is not None else letter(text, font, SMALLEST_FONT)
                x = column * self.cell[1] + place(dice, ink.width, self.cell[1])
                y = row * self.cell[0] + place(dice, ink.height, self.cell[0])
                what = "number" if is_needle else "word"
                scene.write(ink, x, y, INK, text, what=what, row=row + 1, column=column + 1)
                lines[-1].append(spelled(text))
        transcript = " / ".join(", ".join(line) for line in lines)
        facts = {"row": target[0] + 1, "column": target[1] + 1}
        question = self.ask(dice, "needle.number")
        return Draft(scene, question, number, transcript, reads=(number,), facts=facts)
