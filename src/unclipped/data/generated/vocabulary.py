"""Words and numbers, and the rule that keeps those of the val and test splits out of training.

The rule works on *parts*, so that nothing held out can hide inside a longer string:

- A part of a word is any three consecutive letters (case ignored). A stable hash gives each to train, val or test.
- A part of a number is any two consecutive digits that do not start with a zero. In a fixed order given by a stable
  hash, the first 18 of the 90 belong to test, the next 9 to val, the others to train. Each run of digits counts as a
  number of its own: `12.47` has the parts 12 and 47.
- A string is a *train* string when all its parts are train parts; a *val* (*test*) string when it holds at least one
  val (test) part and none of the other held-out split. Strings that hold parts of both are used by nobody.

Train images, answers, choices and transcripts hold train strings only. Every test string holds a test part and no train
string does, so a test string occurs in training neither alone nor within something longer. Single digits and strings of
one or two letters have no part, and the closed label sets (colours, places, shape names, column titles such as "total",
round axis numbers) are the same in every split: their parts are train parts by decree. Captions quote the strings of
their image; the words around the quotes are alike in every split, as those of questions are, and not bound by the rule.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Literal

from unclipped.core.errors import UsageError
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.words import ENGLISH, LABELS

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"

# Shares of all letter parts. A word of n letters has n − 2 parts, so 12 % of the three-letter words and about 20 % of
# the four-letter words are test words.
WORD_SHARES: dict[str, float] = {"test": 0.12, "val": 0.06}
NUMBER_PARTS: dict[str, int] = {"test": 18, "val": 9}  # of the 90 two-digit parts: 20 % and 10 %

_RUNS = re.compile(r"[a-z]+|[0-9]+")
_MOST_TRIES = 100_000


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def parts_of(text: str) -> list[str]:
    """The parts of a string: three-letter and two-digit pieces, see the rule above."""
    parts = []
    for run in _RUNS.findall(text.lower()):
        if run[0].isdigit():
            parts += [run[i : i + 2] for i in range(len(run) - 1) if run[i] != "0"]
        else:
            parts += [run[i : i + 3] for i in range(len(run) - 2)]
    return parts


def _number_parts() -> dict[str, Split]:
    # Round tens stand on chart axes in every split, so they are train parts by decree.
    order = sorted((str(n) for n in range(10, 100) if n % 10), key=lambda part: _hash("number part " + part))
    test, val = NUMBER_PARTS["test"], NUMBER_PARTS["val"]
    splits: dict[str, Split] = {str(n): "train" for n in range(10, 100)}
    splits |= dict.fromkeys(order[:test], "test")
    splits |= dict.fromkeys(order[test : test + val], "val")
    return splits


def split_of_whole(text: str) -> Split:
    """The split of something that is held out as a whole, such as a row of class words."""
    point = _hash("whole " + text)
    test, val = WORD_SHARES["test"], WORD_SHARES["val"]
    return "test" if point < test else "val" if point < test + val else "train"


_DECREED = {part for label in LABELS for part in parts_of(label)}
_PART_SPLIT: dict[str, Split] = _number_parts()


def split_of_part(part: str) -> Split:
    """The split that a part belongs to."""
    split = _PART_SPLIT.get(part)
    if split is None:
        point = _hash("word part " + part)
        test, val = WORD_SHARES["test"], WORD_SHARES["val"]
        split = "test" if point < test else "val" if point < test + val else "train"
        if part in _DECREED:
            split = "train"
        _PART_SPLIT[part] = split
    return split


def split_of(text: str) -> Split | None:
    """The split whose string this is; None when it holds parts of both held-out splits and nobody may use it."""
    splits = {split_of_part(part) for part in parts_of(text)}
    if "test" in splits:
        return None if "val" in splits else "test"
    return "val" if "val" in splits else "train"


@lru_cache(maxsize=64)
def _numbers(split: Split, digits: int) -> tuple[str, ...]:
    low = 10 ** (digits - 1) if digits > 1 else 0
    return tuple(text for text in map(str, range(low, 10**digits)) if split_of(text) == split)


@lru_cache(maxsize=64)
def _english(split: Split, word_length: tuple[int, int]) -> tuple[str, ...]:
    low, high = word_length
    return tuple(word for word in ENGLISH if low <= len(word) <= high and split_of(word) == split)


class Vocabulary:
    """Words and numbers that one split may show.

    `held_out_numbers` is the share of held-out values among the numbers of val and test; words there are all held out.
    Raises UsageError when the split has fewer than 12 words of the wanted kind.
    """

    def __init__(
        self,
        split: Split,
        *,
        words: Literal["syllables", "english"] = "syllables",
        word_length: tuple[int, int] = (3, 4),
        digits: tuple[int, int] = (2, 2),
        held_out_numbers: float = 0.5,
    ) -> None:
        self.split: Split = split
        self.words = words
        self.word_length = word_length
        self.digits = digits
        self.held_out_numbers = held_out_numbers
        if words == "english" and len(_english(split, word_length)) < 12:
            raise UsageError(
                f"options.word_length {list(word_length)}: only {len(_english(split, word_length))} English words of "
                f"that length in split '{split}', at least 12 are needed; widen the range or take words: syllables"
            )

    def word(self, dice: Dice, length: int | None = None) -> str:
        """A word of this split; `length` letters when given (syllables only)."""
        if self.words == "english":
            return dice.pick(_english(self.split, self.word_length))
        for _ in range(_MOST_TRIES):
            count = length or dice.between(self.word_length)
            word = "".join([dice.pick(VOWELS if i % 2 else CONSONANTS) for i in range(count)])
            if split_of(word) == self.split:
                return word
        raise UsageError(f"options.word_length {list(self.word_length)}: no such word in '{self.split}'; shorten it")

    def number(self, dice: Dice, digits: int | None = None) -> str:
        """A number as text; `digits` digits when given. Held-out values are mixed with seen ones in val and test."""
        count = digits or dice.between(self.digits)
        held_out = self.split != "train" and count > 1 and dice.chance(self.held_out_numbers)
        return self.number_of(dice, self.split if held_out else "train", count)

    def number_of(self, dice: Dice, split: Split, digits: int) -> str:
        """A number with the given count of digits out of one split's values."""
        if digits <= 4:
            return dice.pick(_numbers(split, digits))
        for _ in range(_MOST_TRIES):
            text = dice.pick("123456789") + "".join([dice.pick("0123456789") for _ in range(digits - 1)])
            if split_of(text) == split:
                return text
        raise UsageError(f"options.digits {list(self.digits)}: no such number in '{split}'; use fewer digits")

    def widest(self) -> tuple[str, ...]:
        """Strings that take as much room as any word or number of this vocabulary may: measure them before drawing."""
        syllables = ("mo" * self.word_length[1])[: self.word_length[1]]
        words = _english(self.split, self.word_length) if self.words == "english" else (syllables,)
        return (*words, "8" * self.digits[1], "bjp")

    def allows(self, text: str) -> bool:
        """True when a picture of this split may show the string."""
        return split_of(text) in ("train", self.split)


def is_held_out(text: str) -> bool:
    """True when the string never occurs in training."""
    return split_of(text) != "train"
