"""Configuration of distillation from a frozen teacher. Imports no torch."""

from __future__ import annotations

from pydantic import model_validator

from unclipped.core.config import Count, FrozenConfig, LossWeight, PathText

WEIGHTS = ("features", "direction", "amplitude", "relation", "pooled")


class DistillConfig(FrozenConfig):
    """Learning the features of a frozen teacher encoder."""

    teacher: PathText
    """Folder (`$NAME` is an environment variable) or hub id of the teacher, any vision encoder."""
    baseline: bool = False
    """Allow a teacher that was trained by comparing images with text; its student is a baseline as well."""
    features: LossWeight = 1.0
    """Weight of smooth-L1 to the teacher's standardised patch features."""
    direction: LossWeight = 1.0
    """Weight of 1 − cosine between patch features."""
    amplitude: LossWeight = 1.0
    """Weight of the absolute difference of patch features."""
    relation: LossWeight = 1.0
    """Weight of the difference of the cosines between an image's patches."""
    pooled: LossWeight = 1.0
    """Weight of 1 − cosine between pooled features (class token, else the mean of the patches)."""
    relation_chunk: Count | None = None
    """Rows of the relation matrices compared at a time; null: all."""
    resize_grid: bool = False
    """Resize a teacher's grid of patches that differs from the student's, bilinearly; false: refuse it."""

    @model_validator(mode="after")
    def _learns(self) -> DistillConfig:
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"distill: all weights are zero; give one of {', '.join(WEIGHTS)} a positive weight")
        return self
