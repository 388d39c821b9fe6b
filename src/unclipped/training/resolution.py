"""The side of the images from stage to stage: what is checked before the first, and what changes as each begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unclipped.core.errors import UsageError
from unclipped.encoders.positions import resize_positions
from unclipped.images.config import ImageRule
from unclipped.objectives.trunk import Trunk
from unclipped.training.batches import Examples
from unclipped.training.config import PhaseStage, PretrainConfig, StageConfig


class Resolution:
    """Keeps trunks and rule of the images at the side of the present stage."""

    def __init__(self, config: PretrainConfig, rule: ImageRule, trunks: Sequence[Trunk]) -> None:
        """`rule`: side in the main stage, mean and deviation in all. `trunks`: every encoder that is at that side, the
        trained one first. Raises UsageError for a phase that is no larger, or that patches do not fill."""
        assert rule.size is not None
        self.config, self.rule, self.trunks = config, rule, tuple(trunks)
        self.main_side = rule.size[0]
        self.notes: list[str] = []
        """What there is to say, for the machinery of the stages."""
        self._begin()
        patch = self.trunks[0].patch_size
        for number, phase in enumerate(config.phases):
            where, side = f"phases.{number}.image_size", phase.image_size
            if side <= self.main_side:
                raise UsageError(f"{where}: expected more than the {self.main_side} px of the main stage, found {side}")
            if any(side % pixels for pixels in patch):
                raise UsageError(f"{where}: {side} px are no multiple of the patch of {patch[0]}×{patch[1]} px")

    def side(self, stage: StageConfig) -> int:
        """Side of the images of a stage in pixels."""
        return stage.image_size if isinstance(stage, PhaseStage) else self.main_side

    def rule_of(self, stage: StageConfig) -> ImageRule:
        """The images of a stage: mean and deviation are those of the main one."""
        side = self.side(stage)
        return self.rule.model_copy(update={"size": (side, side)})

    def scaled(self, stage: StageConfig, pixels: int, multiple: int = 1) -> int:
        """A length of the main stage in proportion to the side of `stage`, to the nearest multiple."""
        if not isinstance(stage, PhaseStage):
            return pixels
        return max(multiple, round(pixels * self.side(stage) / self.main_side / multiple) * multiple)

    def enter(self, stage: StageConfig) -> None:
        """Bring every trunk's position table, and what is saved about the images, to the side of `stage`."""
        self.rule = self.rule_of(stage)
        said = self._resized(self.side(stage))
        if isinstance(stage, PhaseStage):
            self.notes.append(said)

    def later(self, stage: StageConfig, examples: Examples) -> Examples:
        """`examples` from the first draw on that no earlier stage has taken."""
        first = self.first_draw(stage)
        return LaterExamples(examples, first) if first else examples

    def first_draw(self, stage: StageConfig) -> int:
        """Draws that the stages before `stage` take."""
        stages = self.config.stages()
        place = [one.name for one in stages].index(stage.name)
        return sum(one.steps * one.batch_size for one in stages[:place])

    def _begin(self) -> None:
        """Bring the encoder under `init` to the main stage's side."""
        if self.config.init is not None:
            family = self.trunks[0].encoder.family
            self.notes.append(f"starts from the {family} {self.config.init}; {self._resized(self.main_side)}")

    def _resized(self, side: int) -> str:
        """Bring all trunks to `side`, and say so."""
        changes = [resize_positions(trunk.encoder, side) for trunk in self.trunks]
        rows, columns = self.trunks[0].patch_size
        said = f"images of {side}×{side} px, {side // rows}×{side // columns} patches"
        if (change := changes[0]) is not None:
            said += f"; positions interpolated from {change[0]}×{change[0]}"
        return said


class LaterExamples:
    """Examples counted from a later draw: a stage goes on with the data where the one before it ended."""

    def __init__(self, examples: Examples, first: int) -> None:
        self.examples, self.first = examples, first
        self.rule = getattr(examples, "rule", None)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """As the examples' own."""
        return self.examples.batch([self.first + index for index in indices])

    def lengths(self, indices: Sequence[int]) -> Sequence[int]:
        """As the examples' own."""
        return self.examples.lengths([self.first + index for index in indices])
