"""A vision encoder from images alone, by DINOv2: its examples (crops and masks) and its job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclipped.core.errors import DataError, UsageError
from unclipped.data.mixture import Mixture
from unclipped.data.sample import ImagePart
from unclipped.data.views import MultiCrop
from unclipped.encoders.spec import declare_objective
from unclipped.images.config import ImageRule
from unclipped.images.prepare import decoded, normalised
from unclipped.objectives.block_masks import block_mask
from unclipped.objectives.dino_side import DINO_HEADS, DinoHeads, save_dino_heads
from unclipped.objectives.dinov2 import DinoV2Objective
from unclipped.objectives.trunk import Trunk, save_trunk
from unclipped.training.batches import Examples
from unclipped.training.config import PhaseStage, PretrainConfig, StageConfig
from unclipped.training.continued import goes_on, heads_notes, take_dino_heads
from unclipped.training.device import world
from unclipped.training.fresh_trunk import declared_objective, first_images, fresh_trunk, image_rule
from unclipped.training.resolution import Resolution
from unclipped.training.stages import Job, stage_seed


class CropExamples:
    """Example i is an image of draw i; its crops, colours and masks are functions of the seed and i."""

    def __init__(
        self, mixture: Mixture, rule: ImageRule, config: PretrainConfig, trunk: Trunk, *, local_size: int
    ) -> None:
        """`rule`: side of the global crops, mean and standard deviation. `local_size`: side of the local ones."""
        assert rule.size is not None
        self.mixture, self.rule, self.options, self.seed = mixture, rule, config.dinov2, config.training.seed
        self.local_size = local_size
        options, side = config.dinov2, rule.size[0]
        self.grid = (side // trunk.patch_size[0], side // trunk.patch_size[1])
        local = local_size // trunk.patch_size[0], local_size // trunk.patch_size[1]
        self.num_patches = 2 * self.grid[0] * self.grid[1] + options.local_crops * local[0] * local[1]
        self.crop = MultiCrop(
            side,
            local_size,
            options.local_crops,
            options.global_scale,
            options.local_scale,
            colours=options.colours,
        )

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`global_crops` (2·B, C, S, S), `local_crops` (L·B, C, s, s), `mask` (2·B, patches), `sample_ids`."""
        loaded = [self.mixture.first_good(index, lambda item, i=index: self._views(item, i)) for index in indices]
        views = [crops for _, crops in loaded]
        channels, small = self.rule.channels, self.local_size
        global_crops = [view[number] for number in range(2) for view in views]
        local_crops = [view[2 + number] for number in range(self.options.local_crops) for view in views]
        none = torch.zeros((0, channels, small, small), dtype=torch.uint8)
        masks = [self._mask(index, number) for number in range(2) for index in indices]
        return {
            "global_crops": normalised(_planes(global_crops), self.rule),
            "local_crops": normalised(_planes(local_crops) if local_crops else none, self.rule),
            "mask": torch.from_numpy(np.stack(masks)),
            "sample_ids": [name for name, _ in loaded],
        }

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """All images give equally many patches."""
        return [self.num_patches] * len(indices)

    def _views(self, item: Any, index: int) -> tuple[str, list[np.ndarray]]:
        """(sample id, crops) of one of the sample's images."""
        parts: tuple[ImagePart, ...] = tuple(item.images)
        if not parts:
            raise DataError(f"sample {item.id}: has no image, which dinov2 needs")
        generator = np.random.default_rng([self.seed, index, 31])
        part = parts[int(generator.integers(len(parts)))]
        return item.id, self.crop(decoded(part, self.rule), generator)

    def _mask(self, index: int, number: int) -> np.ndarray:
        """(patches,) bool of global crop `number`."""
        generator, patches = np.random.default_rng([self.seed, index, 32, number]), self.grid[0] * self.grid[1]
        is_masked = self.options.ibot_weight > 0 and generator.random() < self.options.masked_share
        count = round(generator.uniform(*self.options.mask_ratio) * patches) if is_masked else 0
        return block_mask(self.grid, count, generator).reshape(-1)


def _planes(crops: Sequence[np.ndarray]) -> Tensor:
    """N crops (side, side, C) → (N, C, side, side) uint8."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def dinov2_job(config: PretrainConfig) -> Job:
    """Measure the pixels, build the encoder and describe the training; the teacher's encoder is what is saved.

    Raises UsageError for a batch in which KoLeo finds no neighbour, and for shapes that do not fit.
    """
    stages = config.stages()
    for stage in stages:
        each = stage.batch_size // (stage.gradient_accumulation * world()[1])
        if config.dinov2.koleo_weight and each < 2:
            raise UsageError(
                f"batch_size: koleo needs at least two images in a micro-batch of one process, found {each}; raise "
                "batch_size, lower gradient_accumulation, or set dinov2.koleo_weight to 0"
            )
    torch.manual_seed(config.training.seed)
    trunk, side = fresh_trunk(config, maskable=True)
    declared = declared_objective(trunk, "self_supervised")
    declare_objective(trunk.encoder.model.config, declared)  # whatever the family usually stands for
    mixture = Mixture(config.data, config.training.seed)
    rule = image_rule(config, trunk, side, first_images(mixture))
    torch.manual_seed(stage_seed(config.training, 0))  # heads are new tensors of the main stage
    objective: Any = DinoV2Objective(trunk, config.dinov2, steps=stages[0].schedule_length)
    if goes_on(config):
        take_dino_heads(config, objective)
    resolution = Resolution(config, rule, (trunk, objective.teacher.trunk))
    resolution.notes += heads_notes(config, DINO_HEADS)
    for number, stage in enumerate(stages):
        where = f"phases.{number - 1}.local_size" if number else "dinov2.local_size"
        _check_local_size(trunk, _local_size(config, resolution, trunk, stage), where)

    def make_objective(stage: StageConfig, carried: dict[str, Any]) -> DinoV2Objective:
        resolution.enter(stage)
        objective.start_stage(stage.schedule_length)
        return objective

    def make_examples(stage: StageConfig) -> Examples:
        local_size = _local_size(config, resolution, trunk, stage)
        examples = CropExamples(mixture, resolution.rule_of(stage), config, trunk, local_size=local_size)
        return resolution.later(stage, examples)

    def save(folder: Path) -> None:
        teacher = objective.teacher
        save_trunk(teacher.trunk, folder, resolution.rule)
        save_dino_heads(folder, DinoHeads(teacher.dino_head, teacher.ibot_head, teacher.trunk.mask_token))

    return Job(
        model=objective,
        make_objective=make_objective,
        make_examples=make_examples,
        save=save,
        fit=resolution.enter,
        notes=resolution.notes,
    )


def _local_size(config: PretrainConfig, resolution: Resolution, trunk: Trunk, stage: StageConfig) -> int:
    """Side in pixels of the local crops of a stage: what the phase says, else in proportion to its images."""
    if isinstance(stage, PhaseStage) and stage.local_size is not None:
        return stage.local_size
    return resolution.scaled(stage, config.dinov2.local_size, math.lcm(*trunk.patch_size))


def _check_local_size(trunk: Trunk, local_size: int, where: str) -> None:
    """Raise UsageError for local crops that whole patches do not fill."""
    if any(local_size % patch for patch in trunk.patch_size):
        raise UsageError(
            f"{where}: local crops of {local_size} px are no multiple of the patch of "
            f"{trunk.patch_size[0]}×{trunk.patch_size[1]} px"
        )
