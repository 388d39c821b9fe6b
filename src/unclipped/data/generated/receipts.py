"""A shop's receipt: goods and prices in lines, a total that adds up, a date."""

from __future__ import annotations

from dataclasses import dataclass

from unclipped.core.errors import UsageError
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, ImageGenerator, distinct, place, spelled
from unclipped.data.generated.lettering import letter
from unclipped.data.generated.options import ReceiptsOptions
from unclipped.data.generated.phrasing import ORDINALS
from unclipped.data.generated.scene import INK, Scene
from unclipped.data.generated.vocabulary import Split, split_of

MOST_TRIES = 1000
MARGIN = 4  # px at the left and right


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the receipt says. Prices and total as printed, in the order of the lines."""

    shop: str
    date: str
    names: list[str]
    prices: list[str]
    total: str


@GENERATORS.register("receipts")
class Receipts(ImageGenerator):
    """Receipts on a plain background: shop, date, goods, total, from top to bottom."""

    options: ReceiptsOptions
    kinds = ("text",)

    def __init__(self, options: ReceiptsOptions, split: Split) -> None:
        super().__init__(options, split)
        height, width = options.size
        price = "8" * (options.digits[1] + 1) + ".88"  # the total may be a digit longer than a price
        pairs = [f"{word}  {price}" for word in (*self.vocabulary.widest(), "total")]
        self.require_room("a line", [*pairs, "88-88-88"], width - 2 * MARGIN, height // (options.items[1] + 3) - 2)

    def draft(self, dice: Dice, category: str) -> Draft:
        receipt = self._receipt(dice)
        scene = self._lay(dice, receipt)
        question, answer, reads = getattr(self, "_" + category)(dice, receipt)
        return Draft(scene, question, answer, _transcript(receipt), reads=reads)

    # -- content ------------------------------------------------------------------------------------------------------

    def _price(self, dice: Dice) -> str:
        """A price whose parts this split may show, held out or not as the options want it."""
        vocabulary = self.vocabulary
        held_out = self.split != "train" and dice.chance(self.options.held_out_numbers)
        wanted = self.split if held_out else "train"
        for _ in range(MOST_TRIES):
            digits = dice.between(self.options.digits)
            low = 10 ** (digits - 1)
            text = f"{dice.between((low, 10 * low - 1))}.{dice.below(100):02d}"
            if split_of(text) == wanted:
                return text
        raise UsageError(f"generated:receipts: no price for split '{vocabulary.split}'; widen options.digits")

    def _receipt(self, dice: Dice) -> Receipt:
        count = dice.between(self.options.items)
        shop, *names = self.words(dice, count + 1)
        for _ in range(MOST_TRIES):
            prices: list[str] = []
            for _ in range(count):
                prices.append(distinct(lambda: self._price(dice), prices, "prices"))
            cents = sum(int(price.replace(".", "")) for price in prices)
            total = f"{cents // 100}.{cents % 100:02d}"
            # The total is a number of the image like any other: it may not show what is held out.
            if self.vocabulary.allows(total):
                return Receipt(shop, self._date(dice), names, prices, total)
        raise UsageError("generated:receipts: no total that this split may show; lower options.items or digits")

    def _date(self, dice: Dice) -> str:
        """Day, month and year, two digits each; in val and test some part is held out."""
        for _ in range(MOST_TRIES):
            text = f"{dice.between((1, 28)):02d}-{dice.between((1, 12)):02d}-{dice.below(100):02d}"
            if split_of(text) == self.split:
                return text
        raise UsageError(f"generated:receipts: no date for split '{self.split}'")

    # -- layout -------------------------------------------------------------------------------------------------------

    def _lay(self, dice: Dice, receipt: Receipt) -> Scene:
        scene = self.blank(dice)
        font = dice.pick(self.options.fonts)
        lines = len(receipt.names) + 3
        left_texts = [*receipt.names, "total"]
        right_texts = [*receipt.prices, receipt.total]
        size = dice.between(self.options.font_size)
        width = scene.width - 2 * MARGIN
        line_height = scene.height // lines
        size = self.common_font_size([receipt.shop, receipt.date], font, size, width, line_height - 2)
        pairs = [f"{left}  {right}" for left, right in zip(left_texts, right_texts, strict=True)]
        size = self.common_font_size(pairs, font, size, width, line_height - 2)
        widest = max(letter(text, font, size).width for text in [*pairs, receipt.shop, receipt.date])
        block = min(width, widest + dice.below(max(1, width - widest)))
        x0 = place(dice, block, scene.width)
        line_height = min(line_height, size + 2 + dice.below(size // 2))
        baseline = place(dice, lines * line_height, scene.height) + line_height - max(2, line_height // 4)
        rgb = dice.pick((INK, (60, 40, 110), (30, 70, 60)))

        def write(text: str, align: str, row: int, role: str) -> None:
            ink = letter(text, font, size)
            free = block - ink.width
            x = x0 + {"left": 0, "middle": free // 2, "right": free}[align]
            y = min(baseline + row * line_height - ink.baseline, scene.height - ink.height)
            scene.write(ink, x, max(0, y), rgb, text, role=role, line=row + 1, font=font, font_size=size)

        write(receipt.shop, "middle", 0, "shop")
        write(receipt.date, "middle", 1, "date")
        for row, (name, price) in enumerate(zip(receipt.names, receipt.prices, strict=True), start=2):
            write(name, "left", row, "name")
            write(price, "right", row, "price")
        write("total", "left", lines - 1, "title")
        write(receipt.total, "right", lines - 1, "total")
        return scene

    # -- questions: (question, answer, strings read) -----------------------------------------------------------------

    def _read_number(self, dice: Dice, receipt: Receipt) -> tuple[str, str, tuple[str, ...]]:
        k = dice.below(len(receipt.names) + 1)
        if k == len(receipt.names):
            return self.ask(dice, "receipts.total"), receipt.total, (receipt.total,)
        name, price = receipt.names[k], receipt.prices[k]
        # `held_out` speaks of the number; the name is held out in every val and test image.
        return self.ask(dice, "receipts.price", name=name), price, (price,)

    def _read_text(self, dice: Dice, receipt: Receipt) -> tuple[str, str, tuple[str, ...]]:
        form = dice.pick(("shop", "date", "item_at"))
        if form == "item_at":
            k = dice.below(len(receipt.names))
            question = self.ask(dice, "receipts.item_at", price=receipt.prices[k])
            return question, receipt.names[k], (receipt.names[k],)
        answer = receipt.shop if form == "shop" else receipt.date
        return self.ask(dice, "receipts." + form), answer, (answer,)

    def _read_kth(self, dice: Dice, receipt: Receipt) -> tuple[str, str, tuple[str, ...]]:
        k = dice.below(len(receipt.names))
        return self.ask(dice, "receipts.kth", k=k + 1, kth=ORDINALS[k]), receipt.names[k], (receipt.names[k],)

    def _count(self, dice: Dice, receipt: Receipt) -> tuple[str, str, tuple[str, ...]]:
        return self.ask(dice, "receipts.count"), str(len(receipt.names)), ()

    def _compare(self, dice: Dice, receipt: Receipt) -> tuple[str, str, tuple[str, ...]]:
        form = dice.pick(("dearest", "cheapest"))
        ranked = sorted(zip(receipt.prices, receipt.names, strict=True), key=lambda pair: float(pair[0]))
        name = ranked[-1][1] if form == "dearest" else ranked[0][1]
        return self.ask(dice, "receipts." + form), name, (name, *receipt.prices)


def _transcript(receipt: Receipt) -> str:
    goods = [f"{spelled(name)} {spelled(price)}" for name, price in zip(receipt.names, receipt.prices, strict=True)]
    lines = [spelled(receipt.shop), spelled(receipt.date), *goods, f"total {spelled(receipt.total)}"]
    return " / ".join(lines)
