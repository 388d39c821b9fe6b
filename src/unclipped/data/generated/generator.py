"""What every generator offers: drafts of scenes with a question and its exact answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unclipped.core.config import FrozenConfig
from unclipped.core.errors import UsageError
from unclipped.core.registry import Registry
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.lettering import SMALLEST_FONT, letter
from unclipped.data.generated.options import GeneratedOptions
from unclipped.data.generated.phrasing import ask
from unclipped.data.generated.scene import Colour, Scene
from unclipped.data.generated.vocabulary import Split, Vocabulary


@dataclass(slots=True)
class Draft:
    """A question about a scene. `reads`: the strings that must be read in the image to answer.

    `transcript` tells the scene in text, characters apart; `scene` is None for a task that exists in text only.
    """

    scene: Scene | None
    question: str
    answer: str
    transcript: str
    choices: tuple[str, ...] | None = None
    reads: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class Generator(ABC):
    """One kind of scene. A generator holds no state that drawing changes: drafts depend on the dice alone."""

    tasks: Mapping[str, float]
    """Category -> weight."""
    kinds: tuple[str, ...] = ()
    """Kinds of objects that its scenes hold, in the order of class numbers in masks; none of a task without images."""

    def __init__(self, options: FrozenConfig, split: Split) -> None:
        self.split: Split = split
        self.tasks = {str(task): float(weight) for task, weight in getattr(options, "tasks", {}).items()}

    @property
    def as_text(self) -> bool:
        """True when samples hold a transcript and no image."""
        return True

    @abstractmethod
    def draft(self, dice: Dice, category: str) -> Draft:
        """Draw a scene and a question of the category."""


def distinct(draw: Callable[[], str], taken: Container[str], what: str) -> str:
    """A string from `draw` that is not taken. Raises UsageError when a thousand draws find none."""
    for _ in range(1000):
        text = draw()
        if text not in taken:
            return text
    raise UsageError(f"too few different {what} for one image; widen options.word_length or options.digits")


def place(dice: Dice, length: int, room: int) -> int:
    """Where `length` px start within `room` px: anywhere, one px from both ends where that is possible."""
    margin = 1 if length + 2 <= room else 0
    return margin + dice.below(room - length - 2 * margin + 1)


class ImageGenerator(Generator):
    """A generator that draws images: keeps its options and the words of its split."""

    def __init__(self, options: GeneratedOptions, split: Split) -> None:
        super().__init__(options, split)
        self.options = options
        self.vocabulary = Vocabulary(
            split,
            words=options.words,
            word_length=options.word_length,
            digits=options.digits,
            held_out_numbers=options.held_out_numbers,
        )

    @property
    def as_text(self) -> bool:
        return self.options.as_text

    def blank(self, dice: Dice) -> Scene:
        """An empty scene with a light random background."""
        options = self.options
        height, width = options.size
        background: Colour = (
            dice.between(options.background),
            dice.between(options.background),
            dice.between(options.background),
        )
        return Scene(height, width, background, options.noise, dice.below(2**48) if options.noise else 0)

    def words(self, dice: Dice, count: int) -> list[str]:
        """Different words of this split."""
        words: list[str] = []
        while len(words) < count:
            words.append(distinct(lambda: self.vocabulary.word(dice), words, "words"))
        return words

    def numbers(self, dice: Dice, count: int) -> list[str]:
        """Numbers of different value."""
        numbers: list[str] = []
        while len(numbers) < count:
            numbers.append(distinct(lambda: self.vocabulary.number(dice), numbers, "numbers"))
        return numbers

    def require_room(self, what: str, texts: Sequence[str], width: int, height: int) -> None:
        """Raise UsageError unless each text, in every font at the smallest size, fits width × height px."""
        for font in self.options.fonts:
            for text in texts:
                ink = letter(text, font, SMALLEST_FONT)
                if ink.width > width or ink.height > height:
                    rows, columns = self.options.size
                    raise UsageError(
                        f"options.size {rows}×{columns} leaves {max(0, height)}×{max(0, width)} px for {what}, but "
                        f"'{text}' needs {ink.height}×{ink.width} in the smallest type; enlarge size, or lower "
                        "word_length, digits or the number of things in an image"
                    )

    def common_font_size(self, texts: Sequence[str], font: str, size: int, width: int, height: int) -> int:
        """The largest size up to `size` px in which every text fits width × height px; the smallest if none does."""
        for px in range(size, SMALLEST_FONT, -1):
            inks = [letter(text, font, px) for text in texts]
            if all(ink.width <= width and ink.height <= height for ink in inks):
                return px
        return SMALLEST_FONT

    def ask(self, dice: Dice, form: str, **fields: object) -> str:
        """A question of this generator in the wanted phrasing."""
        return ask(dice, self.options.phrasing, form, **fields)


GENERATORS: Registry[type[Generator]] = Registry("generated task")


def spelled(text: str) -> str:
    """Characters apart, as transcripts give them.

    >>> spelled("47")
    '4 7'
    """
    return " ".join(text)
