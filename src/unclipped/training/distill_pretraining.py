"""A small vision encoder from images alone, by distilling a frozen teacher encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unclipped.core.errors import UsageError
from unclipped.data.mixture import Mixture
from unclipped.data.sources import expanded
from unclipped.data.statistics import statistics_of_images
from unclipped.encoders.build import load_encoder
from unclipped.encoders.spec import declare_objective
from unclipped.images.config import ImageRule
from unclipped.objectives.distill import DistillObjective
from unclipped.objectives.trunk import build_trunk, save_trunk
from unclipped.training.config import PretrainConfig
from unclipped.training.device import world
from unclipped.training.image_pretraining import ImageExamples
from unclipped.training.stages import Job

_MEASURED_IMAGES = 512
_DEFAULT_SIDE = 96


def distill_job(config: PretrainConfig) -> Job:
    """Load the teacher, measure the pixels, build the student and describe the training; the student is saved.

    The student declares the objective its teacher was trained with, so a student of a baseline is one. Raises
    UsageError for a missing or undeclared teacher, several processes, and shapes that do not fit; CheckpointError for
    a teacher that does not load.
    """
    if config.distill is None:
        raise UsageError("distill: expected a teacher, found none; give its folder or hub id as distill.teacher")
    if world()[1] > 1:
        raise UsageError("distill: trains in one process; start it without torchrun")
    folder = expanded(config.distill.teacher, "distill.teacher")
    try:
        teacher, _ = load_encoder(folder, baseline=config.distill.baseline)
    except UsageError as error:
        raise UsageError(f"distill.teacher: {error} (of a teacher: distill.baseline)") from error
    torch.manual_seed(config.training.seed)
    side = config.image_size or config.shape.get("image_size", _DEFAULT_SIDE)
    has_table = config.shape.get("model_type") != "unclipped_llm_encoder"
    trunk = build_trunk(config.shape, image_size=side if has_table else None)
    if any(side % patch for patch in trunk.patch_size):
        raise UsageError(
            f"image_size: {side} px are no multiple of the patch of {trunk.patch_size[0]}×{trunk.patch_size[1]} px"
        )
    declare_objective(trunk.encoder.model.config, teacher.spec.objective)
    mixture = Mixture(config.data, config.training.seed)
    channels: Any = trunk.channels
    rule = ImageRule(rule="squash", size=(side, side), patch_size=trunk.patch_size, channels=channels)
    images = (part for index in range(_MEASURED_IMAGES) for part in mixture.read(index).images)
    mean, std = statistics_of_images(images, rule)
    rule = rule.model_copy(update={"mean": mean, "std": std})
    num_patches = (side // trunk.patch_size[0]) * (side // trunk.patch_size[1])
    objective = DistillObjective(trunk, teacher, config.distill, rule)

    def save(folder: Path) -> None:
        save_trunk(trunk, folder, rule)

    return Job(
        model=trunk,
        make_objective=lambda stage, carried: objective,
        make_examples=lambda stage: ImageExamples(mixture, rule, config, num_patches=num_patches),
        save=save,
    )
