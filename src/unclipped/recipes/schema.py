"""The recipe schemas: what a YAML file of each kind may hold."""

from __future__ import annotations

from typing import Literal

from unclipped.audit.config import EncoderEvaluationConfig
from unclipped.core.config import FrozenConfig
from unclipped.studies.comparison_config import ComparisonConfig
from unclipped.studies.config import ExperimentConfig
from unclipped.training.config import PretrainConfig


class TrainRecipe(ExperimentConfig):
    """A recipe of `unclipped train`."""

    kind: Literal["train"] = "train"
    """Which command runs it."""


class PretrainRecipe(PretrainConfig):
    """A recipe of `unclipped pretrain`."""

    kind: Literal["pretrain"] = "pretrain"
    """Which command runs it."""
    description: str = ""
    """What the run is for, in one sentence."""


class ComparisonRecipe(ComparisonConfig):
    """A recipe of `unclipped compare-objectives`."""

    kind: Literal["comparison"] = "comparison"
    """Which command runs it."""


class EncoderEvaluationRecipe(EncoderEvaluationConfig):
    """A recipe of `unclipped eval-encoder`."""

    kind: Literal["encoder_evaluation"] = "encoder_evaluation"
    """Which command runs it."""
    description: str = ""
    """What is measured, in one sentence."""


SCHEMAS: dict[str, type[FrozenConfig]] = {
    "train": TrainRecipe,
    "pretrain": PretrainRecipe,
    "comparison": ComparisonRecipe,
    "encoder_evaluation": EncoderEvaluationRecipe,
}
"""The schema of each kind of recipe."""
