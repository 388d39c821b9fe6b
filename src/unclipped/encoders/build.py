"""One door to every encoder: built fresh from a configuration, or loaded with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unclipped.core.errors import UsageError, nearest
from unclipped.encoders import hf, llm_encoder  # noqa: F401 - importing them enters their families in the table
from unclipped.encoders.base import ENCODERS, VisionEncoder
from unclipped.encoders.spec import BASELINE_OBJECTIVES


def encoder_class(model_type: str, *, baseline: bool = False) -> type[VisionEncoder]:
    """The adapter of a vision `model_type`.

    Raises UsageError for an unknown family, and for a family trained contrastively unless `baseline` is true.
    """
    if model_type not in ENCODERS:
        raise UsageError(f"unknown vision encoder '{model_type}'; {nearest(model_type, ENCODERS.names())}")
    adapter = ENCODERS.get(model_type)
    if adapter.objective in BASELINE_OBJECTIVES and not baseline:
        raise UsageError(
            f"vision encoder '{model_type}' was trained by comparing images with text ({adapter.objective}); it loads "
            "as a declared baseline only: add `baseline: true` to the recipe's model section, or --baseline"
        )
    return adapter


def build_encoder(
    vision_config: Any,
    *,
    feature_layers: Sequence[int] | None = None,
    baseline: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> VisionEncoder:
    """A freshly initialised encoder for a transformers vision configuration.

    The configuration is kept, with the fields set that feature extraction asks for (no masking, no pooling head).
    mean and std default to those of the family. Raises UsageError for unknown families, undeclared baselines and
    layers out of range.
    """
    adapter = encoder_class(vision_config.model_type, baseline=baseline)
    model = adapter.prepare(adapter.build_model(vision_config))
    return adapter(model, feature_layers=feature_layers, mean=mean, std=std)
