"""Endless sources of generated samples: `source[i]` depends on name, split, options, seed and i alone."""

from __future__ import annotations

from typing import Any

from unclipped.core.errors import UsageError
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import Draft, Generator
from unclipped.data.generated.scene import Scene
from unclipped.data.generated.vocabulary import is_held_out
from unclipped.data.sample import ImagePart, Sample


class GeneratedSource:
    """Samples of one generator and split, drawn when asked for; it keeps nothing, so it may be shared by threads."""

    length: int | None = None  # endless

    def __init__(self, name: str, generator: Generator, seed: int) -> None:
        self.task = name
        self.name = f"generated:{name}"
        self.generator = generator
        self.seed = seed

    def __len__(self) -> int:
        raise TypeError(f"{self.name} is endless: it has no length; take as many samples as wanted")

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`, 0 or more. Raises IndexError below 0."""
        return self._sample(index, *self._draft(index))

    def scene(self, index: int) -> Scene:
        """The ground truth of sample `index`. Raises UsageError for a task without images."""
        _, draft = self._draft(index)
        if draft.scene is None:
            raise UsageError(f"{self.name} draws no image, so it has neither boxes nor masks; take another task")
        return draft.scene

    def _draft(self, index: int) -> tuple[str, Draft]:
        """(category, draft) of sample `index`."""
        if index < 0:
            raise IndexError(f"{self.name}: index {index}; an endless source has no last sample")
        generator = self.generator
        # The split is part of the stream's name: streams of two splits have nothing in common.
        dice = Dice(f"{self.task}/{generator.split}/{self.seed}/{index}")
        category = dice.weighted(generator.tasks)
        return category, generator.draft(dice, category)

    def _sample(self, index: int, category: str, draft: Draft) -> Sample:
        split = self.generator.split
        identity = f"{self.task}-{split}-{self.seed}-{index}"
        metadata: dict[str, Any] = {
            "generator": self.task,
            "split": split,
            # true: a string that must be read to answer never occurs in training
            "held_out": any(is_held_out(text) for text in draft.reads),
            "transcript": draft.transcript,
            **draft.facts,
        }
        if draft.scene is not None:
            metadata["scene"] = draft.scene.as_dict()
        images: tuple[ImagePart, ...] = ()
        question = draft.question
        if draft.scene is None or self.generator.as_text:
            question = f"{draft.transcript}; {question}" if question else draft.transcript
        else:
            images = (ImagePart(draft.scene.paint(), name=identity),)
        return Sample.qa(
            identity, images, question, draft.answer, category=category, choices=draft.choices, metadata=metadata
        )
