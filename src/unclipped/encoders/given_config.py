"""Transformers configurations from fields that a user gives: names, types and sizes checked before anything is built.

Transformers takes most values as they come, and fails or hangs where they are used, or builds something else in silence.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unclipped.core.bounded import bounded
from unclipped.core.errors import UsageError, guarded, nearest
from unclipped.encoders.llm_config import LLMVisionConfig

MAX_PARAMETERS = 10**12
_BUILD_SECONDS, _BUILD_MEMORY = 60, 4 << 30
_MAX_WHOLE, _MAX_NUMBER = 10**9, 1e12
_MAX_TEXT, _MAX_ENTRIES, _MAX_DEPTH = 1000, 10_000, 8
_RANGES = (
    (re.compile(r"(num(_\w+)?_layers|n_layers?|depth)$"), 1, 1024),
    (re.compile(r"(layers|blocks|depths)$"), 0, 1024),
    (re.compile(r"experts(_per_tok)?$"), 0, 4096),
    (re.compile(r"image_size$"), 1, 20_000),
    (re.compile(r"patch_size$"), 1, 4096),
    (re.compile(r"num_labels$"), 0, 100_000),
    (re.compile(r"(heads|n_head)$"), 1, 65_536),
    (re.compile(r"(size|dim|channels|n_embd|n_positions|max_position_embeddings)$"), 1, _MAX_WHOLE),
)
"""Ranges of whole numbers by the ends of their names; the first that fits counts."""


def config_from_fields(model_type: Any, fields: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The configuration of `model_type` with `fields` in place of its defaults, of which a model can be built.

    `where` is the section of the recipe that errors name, as in `shape`. A model is built without memory for its
    weights to see that it can be, and how large it is. Raises UsageError naming the field, what was found and what is
    taken: unknown types and names, values of a wrong type or out of range, fields that do not fit each other, and
    models above `MAX_PARAMETERS` or this machine's memory.
    """
    config = _checked_config(model_type, fields, where)
    check_size(config, where)
    return config


def _checked_config(model_type: Any, fields: Mapping[str, Any], where: str) -> PreTrainedConfig:
    given = dict(fields)
    known = known_config(model_type, where)
    check_fields(known, given, where)
    if model_type == LLMVisionConfig.model_type and isinstance(inner := given.get("text_config"), dict):
        decoder = {name: value for name, value in inner.items() if name != "model_type"}
        given["text_config"] = _checked_config(inner.get("model_type", "qwen3"), decoder, f"{where}.text_config")
    with guarded(lambda reason: UsageError(f"{where}: no {model_type} can be built from these fields ({reason})")):
        return AutoConfig.for_model(model_type, **given)


def known_config(model_type: Any, where: str) -> PreTrainedConfig:
    """The configuration of `model_type` with its defaults. Raises UsageError for a type that transformers lacks."""
    if model_type == LLMVisionConfig.model_type:
        return LLMVisionConfig()
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        valid = nearest(str(model_type)[:80], CONFIG_MAPPING.keys()).partition("; valid:")[0]
        raise UsageError(f"{where}.model_type: unknown '{model_type!s:.80}'; {valid}")
    with guarded(lambda reason: UsageError(f"{where}.model_type: {model_type} has no defaults to start from ({reason})")):
        return CONFIG_MAPPING[model_type]()


def check_fields(known: PreTrainedConfig, fields: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for a field that `known` does not have, or whose value is no such thing as its default is."""
    for name, value in fields.items():
        if not isinstance(name, str) or not hasattr(known, name):
            valid = [field for field in known.to_dict() if not field.startswith("_")]
            hint = nearest(str(name)[:80], valid)
            raise UsageError(f"{where}.{name!s:.80}: {known.model_type} has no such field; {hint}")
        _check_bounds(name, value, f"{where}.{name}")
        _check_type(value, getattr(known, name), f"{where}.{name}")


def _check_type(value: Any, default: Any, where: str) -> None:
    if value is None or default is None:  # the library says which of the two may be left out
        return
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, wanted = _is_whole(value) or _are_whole(value), "a whole number"
    elif isinstance(default, float):
        fits, wanted = _is_whole(value) or isinstance(value, float), "a number"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str), "text"
    elif isinstance(default, (list, tuple)):
        fits, wanted = isinstance(value, (list, tuple)) or _is_whole(value), "a list"
    elif isinstance(default, (dict, PreTrainedConfig)):
        fits, wanted = isinstance(value, (dict, PreTrainedConfig)), "a mapping of fields"
    else:
        return
    if not fits:
        raise UsageError(f"{where}: expected {wanted}, found {_shown(value)}")


def _check_bounds(name: str, value: Any, where: str, depth: int = 0) -> None:
    if isinstance(value, (list, tuple, dict)):
        if len(value) > _MAX_ENTRIES or depth == _MAX_DEPTH:
            raise UsageError(
                f"{where}: expected at most {_MAX_ENTRIES:,} entries, {_MAX_DEPTH} levels deep; found {_shown(value)}"
            )
        pairs = value.items() if isinstance(value, dict) else ((name, item) for item in value)
        for key, item in pairs:
            _check_bounds(str(key), item, where, depth + 1)
    elif isinstance(value, str):
        if len(value) > _MAX_TEXT:
            raise UsageError(f"{where}: expected at most {_MAX_TEXT:,} characters, found {len(value):,}")
    elif _is_whole(value):
        low, high = next(((low, high) for ends, low, high in _RANGES if ends.search(name)), (-1, _MAX_WHOLE))
        if not low <= value <= high:
            raise UsageError(f"{where}: expected a whole number from {low:,} to {high:,}, found {_shown(value)}")
    elif isinstance(value, float) and not (math.isfinite(value) and abs(value) <= _MAX_NUMBER):
        raise UsageError(f"{where}: expected a number from {-_MAX_NUMBER:g} to {_MAX_NUMBER:g}, found {value}")


def check_size(config: PreTrainedConfig, where: str) -> None:
    """Raise UsageError when no model can be built from `config`, or one too large for this machine."""
    complaint = f"{where}: no {config.model_type} can be built from these fields"
    with (
        bounded(complaint, seconds=_BUILD_SECONDS, memory=_BUILD_MEMORY, error=UsageError),
        guarded(lambda reason: UsageError(f"{complaint} ({reason})")),
        torch.device("meta"),
    ):
        count = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise UsageError(f"{where}: a model of {count:,} parameters; the limit is {MAX_PARAMETERS:,}; make it smaller")
    present, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 4 * count
    if needed > present and torch.get_default_device().type != "meta":
        raise UsageError(
            f"{where}: a model of {count:,} parameters needs {needed / 1e9:,.0f} GB of memory, and this machine has "
            f"{present / 1e9:,.0f}; make it smaller"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_whole(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_whole, value))


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return f"{'a mapping' if isinstance(value, dict) else 'a list'} of {len(value):,} entries"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
