"""What an encoder declares about itself, so that nobody slices, normalises or guesses by convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Objective = Literal["self_supervised", "llm_init", "captioning", "sigmoid", "contrastive", "supervised", "none"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
# Objectives that align images with text by comparing them: usable as a measured baseline only.
BASELINE_OBJECTIVES = ("sigmoid", "contrastive")


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
    """How weights of this family were trained, as declared by the family's adapter."""
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
