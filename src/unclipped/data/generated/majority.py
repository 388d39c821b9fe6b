"""Text only: which word of a row is the most frequent. It teaches a language model, in text, the operation that a model
with image tokens in the place of words must perform later."""

from __future__ import annotations

from unclipped.core.config import FrozenConfig
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, Generator
from unclipped.data.generated.options import MajorityOptions
from unclipped.data.generated.vocabulary import Split, split_of_whole


@GENERATORS.register("majority")
class Majority(Generator):
    """Rows such as `photo: hat . shirt hat . .`, answer `hat`."""

    def __init__(self, options: FrozenConfig, split: Split) -> None:
        super().__init__(options, split)
        if not isinstance(options, MajorityOptions):
            raise TypeError(f"expected MajorityOptions, found {type(options).__name__}")
        self.options = options
        self.tasks = {"majority": 1.0}

    def draft(self, dice: Dice, category: str) -> Draft:
        while True:
            row, winner = self._row(dice)
            text = " ".join(row)
            if split_of_whole(text) == self.split:
                break
        options = self.options
        return Draft(None, options.question, winner, f"{options.prefix} {text}".strip(), options.classes)

    def _row(self, dice: Dice) -> tuple[list[str], str]:
        options = self.options
        dots = int(_within(dice, options.dots) * options.length)
        words = options.length - dots
        winner = dice.pick(options.classes)
        times = max(1, round(_within(dice, options.winner) * words))
        counts = {word: 0 for word in options.classes if word != winner}
        for _ in range(words - times):
            # Every other word stays rarer than the winner; places that this leaves over become dots.
            open_words = [word for word, count in counts.items() if count + 1 < times]
            if not open_words:
                break
            counts[dice.pick(open_words)] += 1
        row = [winner] * times + [word for word, count in counts.items() for _ in range(count)]
        return dice.mixed(row + ["."] * (options.length - len(row))), winner


def _within(dice: Dice, bounds: tuple[float, float]) -> float:
    return bounds[0] + dice.random() * (bounds[1] - bounds[0])
