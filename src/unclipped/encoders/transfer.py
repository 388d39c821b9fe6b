"""Weights into an encoder made of a language model: from the language model, or from a published Penguin-VL encoder.

Strict both ways: every tensor of the encoder except the stem comes from the source, every tensor of the source has a
place or is dropped by name, and the report says which.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.checkpoint import (
    load_model,
    quiet,
    raise_misfits,
    read_config,
    stored_values,
)
from unclipped.encoders.importing.gguf import language_model_folder
from unclipped.encoders.llm_config import LLMVisionConfig
from unclipped.encoders.llm_encoder import LLMVisionModel, register_llm_encoder

# Tensors of a language model that an encoder has no use for: the heads.
_LAYER = re.compile(r"layers\.(\d+)\.")
HEADS = (r"^lm_head\.", r"^score\.", r"^classifier\.")


@dataclass(frozen=True)
class TransferReport:
    """Which tensors were taken and dropped (source names) and which are new (encoder names), with parameter counts."""

    taken: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    parameters: Mapping[str, int]
    """Number of values under "taken", "new" and, when the source's size is known, "dropped"."""

    def summary(self) -> str:
        """One line for people."""
        parts = []
        for kind, names in (("taken", self.taken), ("dropped", self.dropped), ("new", self.new)):
            values = f" ({self.parameters[kind]:,} values)" if kind in self.parameters else ""
            parts.append(f"{kind} {len(names)} tensors{values}")
        return ", ".join(parts)


def from_language_model(
    source: str | PreTrainedModel,
    patch_size: int | tuple[int, int] = (14, 14),
    *,
    num_channels: int = 3,
    rope_form: str = "axial",
    rope_theta: float | None = None,
    stem: str = "linear",
    stem_channels: int = 64,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[LLMVisionModel, TransferReport]:
    """Make a vision encoder of a decoder language model: a folder, a hub id, or a model in memory (left untouched).

    Layers and final norm come from the language model; token embedding and head are dropped; the stem is new. layers:
    the first so many, all by default; the final norm is then that of the whole model, over other states. Raises
    CheckpointError when a tensor is missing, misshaped or without a place, UsageError when the decoder cannot become
    an encoder.
    """
    unread, total = [], None
    if isinstance(source, PreTrainedModel):
        language_model = source
    else:
        folder = language_model_folder(source)
        text_config = read_config(folder)
        if getattr(text_config, "vision_config", None) is not None:
            raise CheckpointError(
                f"{folder}: holds '{text_config.model_type}', a model with its own vision part; "
                "llm: needs a text-only language model"
            )
        left = _cut(text_config, layers, str(folder))
        language_model, unread, _ = load_model(folder, text_config, may_drop=(*HEADS, *left), dtype=dtype)
        total = stored_values(folder)
    text_config = copy.deepcopy(language_model.config)
    if isinstance(source, PreTrainedModel):
        _cut(text_config, layers, "the language model")
    config = LLMVisionConfig(
        text_config,
        patch_size=patch_size,
        num_channels=num_channels,
        rope_form=rope_form,
        rope_theta=rope_theta,
        stem=stem,
        stem_channels=stem_channels,
    )
    register_llm_encoder()
    chosen: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with quiet():
        encoder = AutoModel.from_config(config, dtype=dtype, **chosen)
    report = take_layers(encoder, language_model, unread, total)
    return encoder.eval(), report


def _cut(config: Any, layers: int | None, where: str) -> list[str]:
    """Leave the first `layers` layers in a decoder's configuration; patterns of the tensors that then have no place.

    Raises UsageError when it has fewer.
    """
    total = config.num_hidden_layers
    if layers is None or layers == total:
        return []
    if not 1 <= layers <= total:
        raise UsageError(f"layers: {where} has {total} layers, found {layers}; choose from 1 to {total}")
    config.num_hidden_layers = layers
    for name, value in list(vars(config).items()):  # such as `layer_types`, one entry a layer
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:layers])
    return [rf"(^|\.)layers\.{number}\." for number in range(layers, total)]


def take_layers(
    encoder: LLMVisionModel, language_model: PreTrainedModel, unread: list[str], total: int | None
) -> TransferReport:
    """Copy every tensor of the decoder from `language_model`.

    `unread` names what its checkpoint held besides, `total` is the number of values in that checkpoint; a model in
    memory has neither.
    """
    base = language_model.base_model
    prefix = "" if base is language_model else f"{language_model.base_model_prefix}."
    state = language_model.state_dict()
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith(prefix)]
    embeddings = [name for name in inside if name.startswith("embed_tokens.")]
    depth = encoder.config.num_hidden_layers
    beyond = [name for name in inside if (match := _LAYER.match(name)) is not None and int(match[1]) >= depth]
    layers = [name for name in inside if name not in {*embeddings, *beyond}]
    values = copy_tensors(encoder, {f"decoder.{name}": inside[name] for name in layers}, "language model")
    new = [name for name in encoder.state_dict() if name.startswith("stem.")]
    left = count(inside, embeddings + beyond) + count(state, outside) if total is None else total - values
    return TransferReport(
        taken=tuple(prefix + name for name in layers),
        dropped=(*(prefix + name for name in (*embeddings, *beyond)), *outside, *unread),
        new=tuple(new),
        parameters={"taken": values, "dropped": left, "new": count(encoder.state_dict(), new)},
    )


@torch.no_grad()
def copy_tensors(encoder: LLMVisionModel, tensors: Mapping[str, Tensor], where: str, stem: bool = False) -> int:
    """Copy `tensors` (encoder names) into the encoder; returns the number of values.

    With `stem` the stem must be among them. Raises CheckpointError that lists all misfits, before anything is copied.
    """
    target = encoder.state_dict()
    expected = [name for name in target if stem or not name.startswith("stem.")]
    misshaped = [
        f"{name} (found {tuple(tensors[name].shape)}, expected {tuple(target[name].shape)})"
        for name in expected
        if name in tensors and tensors[name].shape != target[name].shape
    ]
    raise_misfits(
        where,
        [name for name in expected if name not in tensors],
        [name for name in tensors if name not in expected],
        misshaped,
    )
    for name in expected:
        target[name].copy_(tensors[name])
    return sum(target[name].numel() for name in expected)


def count(tensors: Mapping[str, Tensor], names: list[str]) -> int:
    """Number of values in the named tensors."""
    return sum(tensors[name].numel() for name in names)


def load_penguin_state(model: LLMVisionModel, state_dict: Mapping[str, Tensor]) -> TransferReport:
    """Load a Penguin-VL encoder under its published tensor names, with or without the prefixes of a whole model.

    `embeddings.patch_embedding` → stem, `encoder.layers` and `encoder.norm` → decoder. Of a whole model's state only
    the part under `vision_encoder.` is read; the rest is reported as dropped. Raises CheckpointError on any misfit.
    """
    if model.config.stem != "linear" or model.config.rope_form != "penguin":
        raise UsageError(
            f"a Penguin-VL encoder needs stem 'linear' and rope_form 'penguin', "
            f"found '{model.config.stem}' and '{model.config.rope_form}'"
        )
    nested = any("vision_encoder." in name for name in state_dict)
    inside = [name for name in state_dict if not nested or "vision_encoder." in name]
    tensors: dict[str, Tensor] = {}
    for name in inside:
        short = name.rpartition("vision_encoder.")[2]
        if short.startswith("embeddings.patch_embedding."):
            target = short.replace("embeddings.patch_embedding.", "stem.projection.")
        else:
            target = re.sub(r"^encoder\.", "decoder.", short)
        tensor = state_dict[name]
        # The published patch embedding is a convolution (D, C, p, p) with stride = kernel: the same linear map.
        tensors[target] = tensor.flatten(1) if target == "stem.projection.weight" else tensor
    values = copy_tensors(model, tensors, "Penguin-VL encoder", stem=True)
    outside = [name for name in state_dict if name not in set(inside)]
    return TransferReport(
        taken=tuple(inside),
        dropped=tuple(outside),
        new=(),
        parameters={"taken": values, "dropped": count(state_dict, outside), "new": 0},
    )
