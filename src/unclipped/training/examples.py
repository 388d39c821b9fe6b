"""Training examples of a vision-language model: draws of a mixture, encoded and collated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unclipped.data.blank import with_blank_images
from unclipped.data.mixture import Mixture
from unclipped.data.sample import Sample, SampleGroup
from unclipped.encoding.collate import Collator
from unclipped.encoding.examples import Example, check_positions, encode


class MixtureExamples:
    """Example i is draw i of the mixture, so the order depends on the mixture's seed alone."""

    def __init__(
        self, mixture: Mixture, processor: Any, *, max_length: int | None = None, positions: int | None = None
    ) -> None:
        """`positions`: those of the decoder; a row that needs more is a bad sample."""
        self.mixture, self.processor, self.max_length, self.positions = mixture, processor, max_length, positions
        self.collator = Collator.for_processor(processor)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The collated batch of these draws; the mixture's policy for bad samples covers encoding too."""
        return self.collator([self.mixture.first_good(index, self._encode) for index in indices])

    def _encode(self, item: Sample | SampleGroup) -> Example:
        if self.mixture.config.blind == "blank":
            item = with_blank_images(item, self.processor.image_processor.mean)
        return check_positions(encode(item, self.processor, max_length=self.max_length), self.positions)

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Estimated tokens of each draw."""
        return [self.mixture.lengths(index, self._image_cost) for index in indices]

    def _image_cost(self, height: int, width: int) -> int:
        from unclipped.images.rules import grid_of

        rule = self.processor.image_processor.image_rule
        rows, columns = grid_of(height, width, rule)
        import torch

        return int(self.processor.num_image_tokens(torch.tensor([[1, rows, columns]]))[0])
