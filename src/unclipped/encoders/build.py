"""One door to every encoder: built fresh from a configuration, or loaded with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unclipped.core.errors import CheckpointError, UsageError, nearest
from unclipped.encoders import hf, llm_encoder  # noqa: F401 - importing them enters their families in the table
from unclipped.encoders.base import ENCODERS, VisionEncoder
from unclipped.encoders.checkpoint import (
    checkpoint_folder,
    load_model,
    pixel_statistics,
    read_config,
    stated_licence,
    stored_values,
)
from unclipped.encoders.source import LLM_PREFIX
from unclipped.encoders.spec import BASELINE_OBJECTIVES, objective_of
from unclipped.encoders.transfer import TransferReport, count, from_language_model

ASSEMBLED = "unclipped"
"""model_type of the folders that `unclipped assemble` and `unclipped train` write."""
LLM_OPTIONS = ("patch_size", "num_channels", "rope_form", "rope_theta", "stem", "stem_channels", "layers")
# Only pretraining uses it, and not every checkpoint has it.
MAY_LACK = (r"(^|\.)mask_token$",)


def encoder_class(model_type: str, *, baseline: bool = False, config: Any = None) -> type[VisionEncoder]:
    """The adapter of a vision `model_type`. `config`: a configuration of it, which may declare its own objective.

    Raises UsageError for an unknown family, and for one trained contrastively unless `baseline` is true.
    """
    if model_type not in ENCODERS:
        raise UsageError(f"unknown vision encoder '{model_type}'; {nearest(model_type, ENCODERS.names())}")
    adapter = ENCODERS.get(model_type)
    objective = objective_of(config, adapter.objective)
    if objective in BASELINE_OBJECTIVES and not baseline:
        raise UsageError(
            f"vision encoder '{model_type}' was trained by comparing images with text ({objective}); it loads "
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
    adapter = encoder_class(vision_config.model_type, baseline=baseline, config=vision_config)
    adapter.adapt_config(vision_config)
    model = adapter.prepare(adapter.build_model(vision_config))
    return adapter(model, feature_layers=feature_layers, mean=mean, std=std)


@dataclass(frozen=True)
class LoadReport(TransferReport):
    """What `load_encoder` did: the tensors, and where the pixel statistics came from."""

    source: str = ""
    family: str = ""
    statistics_from: str = ""
    """File that stated mean and std, "family default", or "given"."""


def load_encoder(
    source: str,
    *,
    feature_layers: Sequence[int] | None = None,
    baseline: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    changes: Mapping[str, Any] | None = None,
    **llm_options: Any,
) -> tuple[VisionEncoder, LoadReport]:
    """An encoder with its weights, in evaluation mode, and the report of what was loaded.

    source: a checkpoint folder, a hub id, or `llm:` and either of them, which turns that language model into an
    encoder; `llm_options` (those of `LLM_OPTIONS`) belong to the last.
    A folder of a whole model (SiglipModel, CLIPModel, ViTMAEForPreTraining, an image classifier) gives its vision part.
    mean and std come from the folder's image processor, else from the family. changes: fields of the configuration in
    place of the folder's, such as `drop_path_rate`; none that a tensor's shape depends on. Raises CheckpointError when
    the checkpoint does not fit, UsageError for an undeclared baseline, unknown families, or options out of place.
    """
    if (mean is None) != (std is None):
        raise UsageError("mean and std: give both or neither")
    if source.startswith(LLM_PREFIX):
        unknown = sorted(set(llm_options) - set(LLM_OPTIONS))
        if unknown:
            raise UsageError(f"unknown encoder option '{unknown[0]}'; {nearest(unknown[0], LLM_OPTIONS)}")
        name = source.removeprefix(LLM_PREFIX)
        model, transfer = from_language_model(name, dtype=dtype, attn_implementation=attn_implementation, **llm_options)
        encoder: VisionEncoder = llm_encoder.LLMEncoder(model, feature_layers=feature_layers, mean=mean, std=std)
        statistics = "family default" if mean is None else "given"
        return encoder, LoadReport(
            **transfer.__dict__, source=source, family=encoder.family, statistics_from=statistics
        )
    if llm_options:
        raise UsageError(f"{sorted(llm_options)[0]}: only for encoders made of a language model (llm:{source})")
    llm_encoder.register_llm_encoder()
    folder = checkpoint_folder(source)
    config = vision_part(read_config(folder), folder)
    adapter = encoder_class(config.model_type, baseline=baseline, config=config)
    for name, value in (changes or {}).items():
        if not hasattr(config, name):
            raise UsageError(f"{folder}: a {config.model_type} has no field '{name}'; leave it out")
        setattr(config, name, value)
    adapter.adapt_config(config)
    model, dropped, new = load_model(
        folder,
        config,
        may_drop=adapter.dropped,
        may_lack=MAY_LACK,
        dtype=dtype,
        attn_implementation=attn_implementation,
        **adapter.build_arguments,
    )
    stated, statistics = pixel_statistics(folder), "given"
    if mean is None:
        mean, std, statistics = stated or (None, None, "family default")
    tensors = model.state_dict()
    taken = [name for name in tensors if name not in new]
    values = {"taken": count(tensors, taken), "new": count(tensors, new)}
    values["dropped"] = stored_values(folder) - values["taken"]
    adapter.prepare(model)
    encoder = adapter(model, feature_layers=feature_layers, mean=mean, std=std, licence=stated_licence(folder))
    return encoder.eval(), LoadReport(
        taken=tuple(taken),
        dropped=tuple(dropped),
        new=tuple(new),
        parameters=values,
        source=source,
        family=adapter.family,
        statistics_from=statistics,
    )


def vision_part(config: Any, folder: Path) -> Any:
    """The vision configuration of a checkpoint's configuration. Raises CheckpointError when there is none known."""
    if config.model_type == ASSEMBLED:
        raise CheckpointError(
            f"{folder}: is an assembled model, not an encoder; start from all of it with model.checkpoint, or save its "
            "encoder by itself (load_model(...)[0].model.vision_tower.model.save_pretrained)"
        )
    for candidate in (config, getattr(config, "vision_config", None)):
        if candidate is not None and candidate.model_type in ENCODERS:
            return candidate
    hint = f"; a language model becomes an encoder as llm:{folder}" if hasattr(config, "vocab_size") else ""
    raise CheckpointError(
        f"{folder}: '{config.model_type}' is no known vision encoder (known: {', '.join(ENCODERS.names())}){hint}"
    )
