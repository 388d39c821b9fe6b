"""What every pretraining of an encoder begins with: fresh weights, the side of its images, and their statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from unclipped.core.errors import UsageError
from unclipped.data.mixture import Mixture
from unclipped.data.sample import ImagePart
from unclipped.data.statistics import statistics_of_images
from unclipped.images.config import ImageRule
from unclipped.objectives.trunk import Trunk, build_trunk
from unclipped.training.config import PretrainConfig

DEFAULT_SIDE = 96
"""Side in pixels of the images where neither recipe nor shape names one."""
MEASURED_IMAGES = 512
"""Images whose mean and deviation stand for all."""


def fresh_trunk(config: PretrainConfig, *, maskable: bool = False) -> tuple[Trunk, int]:
    """The trunk of `config.shape` and the side of its images in pixels. Raises UsageError as `build_trunk`, and for a
    side that patches do not fill."""
    has_table = config.shape.get("model_type") != "unclipped_llm_encoder"
    trunk = build_trunk(config.shape, image_size=config.image_size if has_table else None, maskable=maskable)
    return trunk, side_of(trunk, config.image_size)


def side_of(trunk: Trunk, image_size: int | None) -> int:
    """Side in pixels of the images that a trunk is trained on: that of its position table, else `image_size`, else 96.

    Raises UsageError for a side that patches do not fill.
    """
    native = trunk.encoder.spec.image_size
    side = native[0] if native is not None else image_size or DEFAULT_SIDE
    if any(side % patch for patch in trunk.patch_size):
        raise UsageError(
            f"image_size: {side} px are no multiple of the patch of {trunk.patch_size[0]}×{trunk.patch_size[1]} px"
        )
    return side


def first_images(mixture: Mixture) -> Iterator[ImagePart]:
    """The images of the first draws, as many draws as are measured."""
    return (part for index in range(MEASURED_IMAGES) for part in mixture.read(index).images)


def measured_rule(trunk: Trunk, side: int, images: Iterable[ImagePart]) -> ImageRule:
    """Stretch to side × side px, normalised by the mean and deviation of `images`."""
    channels: Any = trunk.channels
    rule = ImageRule(rule="squash", size=(side, side), patch_size=trunk.patch_size, channels=channels)
    mean, std = statistics_of_images(images, rule)
    return rule.model_copy(update={"mean": mean, "std": std})
