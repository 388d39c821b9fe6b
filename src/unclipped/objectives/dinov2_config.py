"""Configuration of DINOv2 pretraining. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unclipped.core.config import CountOrZero, Decay, FrozenConfig, LossWeight, Pixels, Rate, Share, Whole, Width
from unclipped.data.views_config import ColourConfig

Shares = tuple[Share, Share]


class DinoV2Config(FrozenConfig):
    """Self-distillation of crops and masked patches (arXiv 2304.07193)."""

    local_crops: Annotated[Whole, Field(ge=0, le=256)] = 8
    """Small crops of each image, beside the two global ones."""
    local_size: Pixels = 48
    """Side of a local crop in pixels, a multiple of the patch; global crops are as large as the image."""
    global_scale: Shares = (0.32, 1.0)
    """Smallest and largest share of the image's area in a global crop."""
    local_scale: Shares = (0.05, 0.32)
    """Smallest and largest share of the image's area in a local crop."""
    colours: tuple[ColourConfig, ColourConfig, ColourConfig] | None = None
    """Changes of colour of the first global crop, the second, and the local ones; null: DINOv2's, with blurs in
    proportion to the side."""
    prototypes: Annotated[Whole, Field(ge=1, le=1_048_576)] = 65_536
    """Outputs of each head: the classes into which views and patches are sorted."""
    head_hidden: Width = 2048
    """Width of the heads' two hidden layers."""
    bottleneck: Width = 256
    """Width of the normalised vector before the prototypes, in the head of views."""
    ibot_bottleneck: Width | None = None
    """That of the head of patches; null: `bottleneck`."""
    frozen_prototype_steps: CountOrZero = 0
    """Steps at the beginning in which the prototypes stay as they are."""
    centring: Literal["sinkhorn", "ema"] = "sinkhorn"
    """How the teacher is kept from giving one class to everything: balanced assignment, or a running centre."""
    sinkhorn_iterations: Annotated[Whole, Field(ge=1, le=1000)] = 3
    """sinkhorn: normalisations of prototypes and samples."""
    centre_momentum: Decay = 0.9
    """ema: decay of the running centre."""
    student_temperature: Rate = 0.1
    """Divides the student's scores."""
    teacher_temperature: tuple[Rate, Rate] = (0.04, 0.07)
    """Divides the teacher's scores: first value, and value after `teacher_temperature_steps`."""
    teacher_temperature_steps: CountOrZero = 0
    """Steps of the teacher's temperature from its first to its last value, linearly."""
    teacher_momentum: Shares = (0.994, 1.0)
    """Decay of the teacher's moving average at the first step and at the end of the schedules, on a cosine."""
    ibot_weight: LossWeight = 1.0
    """Weight of the loss on masked patches."""
    koleo_weight: LossWeight = 0.1
    """Weight of the loss that spreads pooled features apart."""
    masked_share: Share = 0.5
    """Probability that a global crop is masked."""
    mask_ratio: Shares = (0.1, 0.5)
    """Smallest and largest share of masked patches in a masked crop."""
