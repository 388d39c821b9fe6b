"""What every generator offers: drafts of scenes with a question and its exact answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unclipped.core.config import FrozenConfig
from unclipped.core.registry import Registry
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.options import GeneratedOptions
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

    def __init__(self, options: FrozenConfig, split: Split) -> None:
        self.split: Split = split

    @property
    @abstractmethod
    def tasks(self) -> Mapping[str, float]:
        """Category -> weight."""

    @property
    def as_text(self) -> bool:
        """True when samples hold a transcript and no image."""
        return True

    @abstractmethod
    def draft(self, dice: Dice, category: str) -> Draft:
        """Draw a scene and a question of the category."""


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


GENERATORS: Registry[type[Generator]] = Registry("generated task")


def spelled(text: str) -> str:
    """Characters apart, as transcripts give them.

    >>> spelled("47")
    '4 7'
    """
    return " ".join(text)
