"""Scenes of the other generators, each with a dense caption, and with boxes and masks of its objects."""

from __future__ import annotations

from typing import cast

from unclipped.core.config import FrozenConfig
from unclipped.data.generated.describing import describe
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.generator import GENERATORS, Draft, Generator, ImageGenerator
from unclipped.data.generated.masks import packed, visible_objects
from unclipped.data.generated.options import CaptionsOptions
from unclipped.data.generated.phrasing import ask
from unclipped.data.generated.vocabulary import Split


@GENERATORS.register("captions")
class Captions(Generator):
    """One image and one answer, its caption; the category is the kind of scene.

    Metadata beside that of every generated task: `masks`, see `unclipped.data.generated.masks`; boxes stand in `scene`.
    """

    def __init__(self, options: FrozenConfig, split: Split) -> None:
        super().__init__(options, split)
        if not isinstance(options, CaptionsOptions):
            raise TypeError(f"expected CaptionsOptions, found {type(options).__name__}")
        self.options = options
        self.tasks = {str(scene): weight for scene, weight in options.scenes.items() if weight > 0}
        self.inner = {
            scene: cast(ImageGenerator, GENERATORS.get(scene)(options.of_scene(scene), split)) for scene in self.tasks
        }
        self.kinds = tuple(dict.fromkeys(kind for inner in self.inner.values() for kind in inner.kinds))

    @property
    def as_text(self) -> bool:
        return self.options.as_text

    def draft(self, dice: Dice, category: str) -> Draft:
        inner = self.inner[category]
        # The question of the inner task is left out, but what it asks shapes the scene: counts, sizes and places.
        drawn = inner.draft(dice, dice.weighted(inner.tasks))
        scene = drawn.scene
        assert scene is not None, f"{category} draws no image"
        facts = {**drawn.facts, "masks": packed(visible_objects(scene))}
        question = ask(dice, self.options.phrasing, "captions.describe")
        caption = describe(dice, category, scene)
        return Draft(scene, question, caption, drawn.transcript, reads=tuple(scene.strings()), facts=facts)
