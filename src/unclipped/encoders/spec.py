"""What an encoder declares about itself, so that nobody slices, normalises or guesses by convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from unclipped.core.errors import CheckpointError, nearest

Objective = Literal["self_supervised", "llm_init", "captioning", "sigmoid", "contrastive", "supervised", "none"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
# Objectives that align images with text by comparing them: usable as a measured baseline only.
BASELINE_OBJECTIVES = ("sigmoid", "contrastive")
DECLARED = "unclipped_objective"
"""Field of a saved vision configuration that says how these weights were trained, whatever their family stands for."""


def declare_objective(config: Any, objective: Objective) -> None:
    """Write into a vision configuration how its weights were trained."""
    setattr(config, DECLARED, objective)


def objective_of(config: Any, family_objective: Objective) -> Objective:
    """How weights of a configuration were trained: as it declares, else as the family's weights are.

    A family of baselines stays one. Raises CheckpointError for a declaration that is none of `OBJECTIVES`.
    """
    declared = getattr(config, DECLARED, None)
    if declared is None or family_objective in BASELINE_OBJECTIVES:
        return family_objective
    if declared not in OBJECTIVES:
        raise CheckpointError(f"config.json: {DECLARED} '{declared}' is unknown; {nearest(str(declared), OBJECTIVES)}")
    return declared


@dataclass(frozen=True)
class EncoderSpec:
    """Immutable facts of one vision encoder. Sizes are (height, width) in pixels."""

    family: str
    """`model_type` of the vision configuration."""
    patch_size: tuple[int, int]
    """Pixels of a patch: height, width."""
    hidden_size: int
    """Width of the returned features: the model's width times the number of chosen layers."""
    num_prefix_tokens: int
    """Class and register tokens that the model puts before the patches; features come without them."""
    image_size: tuple[int, int] | None
    """Pixels the position table was made for; None when the encoder is native-resolution."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Pixel statistics per channel, applied to values in 0…1."""
    objective: Objective
    """How the weights were trained, as declared by the configuration or else by the family's adapter."""
    licence: str | None = None
    """Licence of the weights, when the checkpoint states one."""
    channels: int = 3

    @property
    def needs_baseline_flag(self) -> bool:
        """True when the encoder was trained to compare images with text, so it loads as a declared baseline only."""
        return self.objective in BASELINE_OBJECTIVES

    @property
    def patch_values(self) -> int:
        """Values of one packed patch: channels · height · width."""
        return self.channels * self.patch_size[0] * self.patch_size[1]
