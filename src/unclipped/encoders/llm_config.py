"""Configuration of a vision encoder made of a decoder language model."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from unclipped.core.errors import UsageError, nearest
from unclipped.encoders.rotary import ROPE_FORMS

STEMS = ("linear", "convolution")


class LLMVisionConfig(PreTrainedConfig):
    """A decoder's configuration (`text_config`) with what turns it into a vision encoder.

    patch_size: (height, width) of a patch in pixels, or one number. num_channels: 1 or 3. rope_form: "axial" or
    "penguin" (see `unclipped.encoders.rotary`). rope_theta: replaces the decoder's base frequency, for all its kinds
    of layers; None keeps it. stem: "linear" or "convolution"; stem_channels: width of the latter.

    The copy of the decoder's configuration kept here has no vocabulary (`vocab_size` 1, no special tokens), because
    the encoder has no token embedding; its own data type is left to the model that holds it.
    """

    model_type = "unclipped_llm_encoder"
    sub_configs = {"text_config": AutoConfig}  # type: ignore # noqa: RUF012 - the form that transformers reads

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        patch_size: int | tuple[int, int] | list[int] = (14, 14),
        num_channels: int = 3,
        rope_form: str = "axial",
        rope_theta: float | None = None,
        stem: str = "linear",
        stem_channels: int = 64,
        **kwargs: Any,
    ) -> None:
        if rope_form not in ROPE_FORMS:
            raise UsageError(f"unknown rope_form '{rope_form}'; {nearest(rope_form, ROPE_FORMS)}")
        if stem not in STEMS:
            raise UsageError(f"unknown stem '{stem}'; {nearest(stem, STEMS)}")
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(sides) != 2 or min(sides) < 1:
            raise UsageError(f"patch_size: expected a positive number or (height, width), found {patch_size}")
        self.text_config = without_vocabulary(text_config)
        if rope_theta is not None:
            set_rope_theta(self.text_config, rope_theta)
        self.patch_size = sides
        self.num_channels = num_channels
        self.rope_form = rope_form
        self.rope_theta = rope_theta
        self.stem = stem
        self.stem_channels = stem_channels
        # Read by transformers' own helpers and by the encoder base; they always equal the decoder's.
        self.hidden_size = self.text_config.hidden_size
        self.num_hidden_layers = self.text_config.num_hidden_layers
        for derived in ("hidden_size", "num_hidden_layers"):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)


def without_vocabulary(text_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A copy of a decoder's configuration without vocabulary, special tokens and data type."""
    if text_config is None:
        config: Any = AutoConfig.for_model("qwen3")
    elif isinstance(text_config, dict):
        fields = dict(text_config)
        config = AutoConfig.for_model(fields.pop("model_type", "qwen3"), **fields)
    else:
        config = copy.deepcopy(text_config)
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, field, None)
    config.vocab_size = 1
    config.tie_word_embeddings = False
    config.dtype = None
    return config


def set_rope_theta(text_config: Any, theta: float) -> None:
    """Set the base frequency in `rope_parameters`, whether flat or one entry a kind of layer.

    Raises UsageError when the decoder has no such parameters.
    """
    parameters = getattr(text_config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        raise UsageError(f"rope_theta: the decoder '{text_config.model_type}' has no rotary parameters to change")
    if "rope_theta" in parameters:
        parameters["rope_theta"] = float(theta)
        return
    for entry in parameters.values():
        if isinstance(entry, dict):
            entry["rope_theta"] = float(theta)
