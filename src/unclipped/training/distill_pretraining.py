"""A small vision encoder from images alone, by distilling a frozen teacher encoder."""

from __future__ import annotations

from typing import Any

import torch

from unclipped.core.errors import UsageError
from unclipped.data.mixture import Mixture
from unclipped.data.sources import expanded
from unclipped.encoders.build import load_encoder
from unclipped.encoders.spec import declare_objective
from unclipped.objectives.distill import DistillObjective
from unclipped.objectives.trunk import save_trunk
from unclipped.training.config import PretrainConfig, StageConfig
from unclipped.training.continued import heads_notes
from unclipped.training.fresh_trunk import declared_objective, first_images, fresh_trunk, image_rule
from unclipped.training.image_pretraining import image_examples
from unclipped.training.resolution import Resolution
from unclipped.training.stages import Job


def distill_job(config: PretrainConfig) -> Job:
    """Load the teacher, measure the pixels, build the student and describe the training; the student is saved.

    The student declares the objective its teacher was trained with, so a student of a baseline is one. With several
    processes each holds the whole teacher, under FSDP2 too: it has neither gradients nor optimiser state. Raises
    UsageError for a missing or undeclared teacher and shapes that do not fit; CheckpointError for a teacher that does
    not load.
    """
    if config.distill is None:
        raise UsageError("distill: expected a teacher, found none; give its folder or hub id as distill.teacher")
    folder = expanded(config.distill.teacher, "distill.teacher")
    try:
        teacher, _ = load_encoder(folder, baseline=config.distill.baseline)
    except UsageError as error:
        raise UsageError(f"distill.teacher: {error} (of a teacher: distill.baseline)") from error
    torch.manual_seed(config.training.seed)
    trunk, side = fresh_trunk(config)
    declare_objective(trunk.encoder.model.config, declared_objective(trunk, teacher.spec.objective))
    mixture = Mixture(config.data, config.training.seed)
    rule = image_rule(config, trunk, side, first_images(mixture))
    objective: Any = DistillObjective(trunk, teacher, config.distill, rule)
    resolution = Resolution(config, rule, (trunk,))
    resolution.notes += heads_notes(config, None)
    for stage in reversed(config.stages()):  # raises now for what does not fit later; ends with the main stage
        objective.fit(resolution.rule_of(stage))

    def make_objective(stage: StageConfig, carried: dict[str, Any]) -> DistillObjective:
        resolution.enter(stage)
        objective.fit(resolution.rule)
        return objective

    return Job(
        model=objective,
        make_objective=make_objective,
        make_examples=lambda stage: image_examples(mixture, resolution, config, stage),
        save=lambda folder: save_trunk(trunk, folder, resolution.rule),
        fit=resolution.enter,
        notes=resolution.notes,
    )
