"""Tables with titled rows and columns: look-ups, and comparisons down a column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, ImageGenerator, distinct, place, spelled
from unclipped.data.generated.lettering import letter
from unclipped.data.generated.options import TablesOptions
from unclipped.data.generated.phrasing import ORDINALS
from unclipped.data.generated.scene import FAINT, INK, Scene
from unclipped.data.generated.vocabulary import Split


@dataclass(frozen=True, slots=True)
class Table:
    """Titles, the kind of each column ("number" or "word"), and the cells by row and column; no string occurs twice."""

    rows: list[str]
    columns: list[str]
    kinds: list[str]
    cells: list[list[str]]

    def of_kind(self, kind: str) -> list[int]:
        """Columns of a kind."""
        return [column for column, found in enumerate(self.kinds) if found == kind]


CELL_MARGIN = 4  # px of a cell's width and height that its text leaves free

Question = tuple[str, str, tuple[str, ...]]  # question, answer, strings read


@GENERATORS.register("tables")
class Tables(ImageGenerator):
    """Tables on a plain background, with a grid, a rule under the titles, or no rules at all."""

    options: TablesOptions
    kinds = ("text", "rule")

    def __init__(self, options: TablesOptions, split: Split) -> None:
        super().__init__(options, split)
        cell_width, cell_height = self._cell_size(options.rows[1] + 1, options.columns[1] + 1)
        self.require_room("a cell", self.vocabulary.widest(), cell_width - CELL_MARGIN, cell_height - CELL_MARGIN)

    def _cell_size(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Width and height, px, of the largest cells that the image holds."""
        height, width = self.options.size
        return (width - 2) // num_columns, (height - 2) // num_rows

    def draft(self, dice: Dice, category: str) -> Draft:
        table = self._table(dice)
        scene = self._lay(dice, table)
        question, answer, reads = getattr(self, "_" + category)(dice, table)
        return Draft(scene, question, answer, _transcript(table), reads=reads)

    def _table(self, dice: Dice) -> Table:
        num_rows, num_columns = dice.between(self.options.rows), dice.between(self.options.columns)
        titles = self.words(dice, num_rows + num_columns)
        # One column of each kind at least, so that every question can be asked of every table.
        kinds = dice.mixed(["number", "word"] + [dice.pick(("number", "word")) for _ in range(num_columns - 2)])
        taken = set(titles)
        cells = []
        for _ in range(num_rows):
            row = []
            for kind in kinds:
                draw = self.vocabulary.number if kind == "number" else self.vocabulary.word
                row.append(self._fresh(dice, draw, taken))
            cells.append(row)
        return Table(titles[:num_rows], titles[num_rows:], kinds, cells)

    @staticmethod
    def _fresh(dice: Dice, draw: Callable[[Dice], str], taken: set[str]) -> str:
        text = distinct(lambda: draw(dice), taken, "entries")
        taken.add(text)
        return text

    # -- layout -------------------------------------------------------------------------------------------------------

    def _lay(self, dice: Dice, table: Table) -> Scene:
        scene = self.blank(dice)
        font = dice.pick(self.options.fonts)
        grid = [["", *table.columns], *([title, *cells] for title, cells in zip(table.rows, table.cells, strict=True))]
        num_rows, num_columns = len(grid), len(grid[0])
        texts = [text for row in grid for text in row if text]
        cell_width, cell_height = self._cell_size(num_rows, num_columns)
        drawn = dice.between(self.options.font_size)
        size = self.common_font_size(texts, font, drawn, cell_width - CELL_MARGIN, cell_height - CELL_MARGIN)
        # One place for the baseline in every row
        above = max(letter(text, font, size).baseline for text in texts)
        below = max(letter(text, font, size).height - letter(text, font, size).baseline for text in texts)
        widest = max(letter(text, font, size).width for text in texts)
        cell_width -= dice.below(max(1, cell_width - CELL_MARGIN - widest + 1))
        cell_height -= dice.below(max(1, cell_height - CELL_MARGIN - above - below + 1))
        width, height = num_columns * cell_width + 1, num_rows * cell_height + 1
        x0, y0 = place(dice, width, scene.width), place(dice, height, scene.height)
        self._rule(dice, scene, (x0, y0, x0 + width, y0 + height), cell_width, cell_height)
        centred = dice.chance(0.5)
        for row, strings in enumerate(grid):
            inks = [letter(text, font, size) if text else None for text in strings]
            baseline = y0 + row * cell_height + (cell_height + 1 - above - below) // 2 + above
            for column, (text, ink) in enumerate(zip(strings, inks, strict=True)):
                if ink is None:
                    continue
                free = cell_width + 1 - ink.width
                x = x0 + column * cell_width + (free // 2 if centred else min(3, free // 2))
                role = "column title" if row == 0 else "row title" if column == 0 else "cell"
                facts = {"role": role, "row": row, "column": column, "font": font, "font_size": size}
                scene.write(ink, x, baseline - ink.baseline, INK, text, **facts)
        return scene

    @staticmethod
    def _rule(dice: Dice, scene: Scene, box: tuple[int, int, int, int], cell_width: int, cell_height: int) -> None:
        """Rules of 1 px between the cells."""
        x0, y0, x1, y1 = box
        style = dice.pick(("grid", "title", "none"))
        if style == "grid":
            for x in range(x0, x1, cell_width):
                scene.fill("rule", (x, y0, x + 1, y1), FAINT)
            for y in range(y0, y1, cell_height):
                scene.fill("rule", (x0, y, x1, y + 1), FAINT)
        elif style == "title":
            scene.fill("rule", (x0, y0 + cell_height, x1, y0 + cell_height + 1), FAINT)

    # -- questions ----------------------------------------------------------------------------------------------------

    def _cell(self, dice: Dice, table: Table, kind: str) -> Question:
        row, column = dice.below(len(table.rows)), dice.pick(table.of_kind(kind))
        answer = table.cells[row][column]
        question = self.ask(dice, "tables.cell", row=table.rows[row], column=table.columns[column])
        # `held_out` speaks of the entry; titles are held out in every val and test image.
        return question, answer, (answer,)

    def _read_number(self, dice: Dice, table: Table) -> Question:
        return self._cell(dice, table, "number")

    def _read_text(self, dice: Dice, table: Table) -> Question:
        return self._cell(dice, table, "word")

    def _read_kth(self, dice: Dice, table: Table) -> Question:
        row, column = dice.below(len(table.rows)), dice.below(len(table.columns))
        answer = table.cells[row][column]
        question = self.ask(dice, "tables.kth", column=table.columns[column], k=row + 1, kth=ORDINALS[row])
        return question, answer, (answer,)

    def _count(self, dice: Dice, table: Table) -> Question:
        form = dice.pick(("rows", "columns"))
        return self.ask(dice, "tables." + form), str(len(table.rows if form == "rows" else table.columns)), ()

    def _compare(self, dice: Dice, table: Table) -> Question:
        column = dice.pick(table.of_kind("number"))
        values = [int(cells[column]) for cells in table.cells]
        form = dice.pick(("largest", "smallest"))
        row = values.index(max(values) if form == "largest" else min(values))
        question = self.ask(dice, "tables." + form, column=table.columns[column])
        return question, table.rows[row], (table.rows[row], *(str(value) for value in values))

    def _locate(self, dice: Dice, table: Table) -> Question:
        row, column = dice.below(len(table.rows)), dice.below(len(table.columns))
        form = dice.pick(("row_of", "column_of"))
        value = table.cells[row][column]
        answer = table.rows[row] if form == "row_of" else table.columns[column]
        return self.ask(dice, "tables." + form, value=value), answer, (answer, value)


def _transcript(table: Table) -> str:
    """Rows parted by strokes, entries by commas; the empty corner is a dash."""
    rows = [["-", *table.columns], *([title, *cells] for title, cells in zip(table.rows, table.cells, strict=True))]
    return " / ".join(", ".join(spelled(text) for text in row) for row in rows)
