"""Transformers configurations from fields that a user gives: names, types and sizes checked before anything is built.

Transformers takes most values as they come: it fails or hangs where they are used, or builds something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unclipped.core.bounded import bounded
from unclipped.core.errors import UnclippedError, UsageError, nearest
from unclipped.encoders.checkpoint import quiet
from unclipped.encoders.llm_config import LLMVisionConfig

T = TypeVar("T", int, float)

MAX_PARAMETERS = 10**12
"""Of a model that is built from fields."""
_BUILD_SECONDS, _BUILD_MEMORY = 60, 4 << 30
_MAX_WHOLE = 10**9
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
_NUMBER_RANGES = (
    (re.compile(r"(dropout|pdrop|prob|drop_path_rate)$"), 0.0, 1.0),
    (re.compile(r"(eps|epsilon|theta|ratio|std|initializer_range)$"), 0.0, 1e12),
)
_DIVIDED = (
    ("hidden_size", "num_attention_heads"),
    ("decoder_hidden_size", "decoder_num_attention_heads"),
    ("num_attention_heads", "num_key_value_heads"),
)
"""Fields of which the second divides the first; widths only where heads have no width of their own."""


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
    with _explained(f"{where}: no {model_type} can be built from these fields"):
        config = AutoConfig.for_model(model_type, **given)
    for width, heads in _DIVIDED:
        whole: Any = getattr(config, width, None)
        part: Any = getattr(config, heads, None)
        counts = width.endswith("heads") or not hasattr(config, "head_dim")
        if counts and _is_whole(whole) and _is_whole(part) and whole % part:
            said = f"{width} ({whole}) is no multiple of {heads} ({part})"
            raise UsageError(f"{where}: no {model_type} can be built from these fields: {said}; change one of the two")
    return config


def known_config(model_type: Any, where: str) -> PreTrainedConfig:
    """The configuration of `model_type` with its defaults. Raises UsageError for a type that transformers lacks."""
    if model_type == LLMVisionConfig.model_type:
        return LLMVisionConfig()
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = nearest(str(model_type)[:80], CONFIG_MAPPING.keys()).partition("valid:")[0]
        raise UsageError(f"{where}.model_type: unknown '{model_type!s:.80}'; {hint}give one of transformers' types")
    with _explained(f"{where}.model_type: {model_type} has no defaults to start from"):
        return CONFIG_MAPPING[model_type]()


def check_fields(known: PreTrainedConfig, fields: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for a field that `known` does not have, or whose value is no such thing as its default is."""
    for name, value in fields.items():
        if not isinstance(name, str) or not hasattr(known, name):
            valid = [field for field in known.to_dict() if not field.startswith("_")]
            hint = nearest(str(name)[:80], valid)
            raise UsageError(f"{where}.{name!s:.80}: {known.model_type} has no such field; {hint}")
        _check_bounds(name, value, f"{where}.{name}")
        _check_type(value, getattr(known, name), f"{where}.{name}: {known.model_type}")


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
        raise UsageError(f"{where} takes {wanted}, found {_shown(value)}")


def _check_bounds(name: str, value: Any, where: str, depth: int = 0) -> None:
    if isinstance(value, (list, tuple, dict)):
        if len(value) > _MAX_ENTRIES or depth == _MAX_DEPTH:
            raise UsageError(
                f"{where}: expected at most {_MAX_ENTRIES:,} entries, {_MAX_DEPTH} levels deep; found {_shown(value)}"
            )
        if isinstance(value, dict):
            for key, item in value.items():
                _check_bounds(str(key), item, f"{where}.{key!s:.80}", depth + 1)
        else:
            for item in value:
                _check_bounds(name, item, where, depth + 1)
    elif isinstance(value, str):
        if len(value) > _MAX_TEXT:
            raise UsageError(f"{where}: expected at most {_MAX_TEXT:,} characters, found {len(value):,}")
    elif _is_whole(value):
        low, high = _range_of(name, _RANGES, (-1, _MAX_WHOLE))
        if not low <= value <= high:
            raise UsageError(f"{where}: expected a whole number from {low:,} to {high:,}, found {_shown(value)}")
    elif isinstance(value, float):
        low, high = _range_of(name, _NUMBER_RANGES, (-1e12, 1e12))
        if not low <= value <= high:  # nan neither
            raise UsageError(f"{where}: expected a number from {low:g} to {high:g}, found {value}")


def check_size(config: PreTrainedConfig, where: str) -> None:
    """Raise UsageError when no model can be built from `config`, or one too large for this machine."""
    complaint = f"{where}: no {config.model_type} can be built from these fields"
    with (
        bounded(complaint, seconds=_BUILD_SECONDS, memory=_BUILD_MEMORY, error=UsageError),
        _explained(complaint),
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


@contextmanager
def _explained(complaint: str) -> Iterator[None]:
    """Turn what transformers raises into a UsageError with all of its message, of which the first line often says
    nothing, and keep what it prints from the terminal."""
    try:
        with quiet():
            yield
    except UnclippedError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{complaint} ({reason:.300})") from error


def _range_of(name: str, ranges: Sequence[tuple[re.Pattern[str], T, T]], default: tuple[T, T]) -> tuple[T, T]:
    return next(((low, high) for ends, low, high in ranges if ends.search(name)), default)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_whole(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_whole, value))


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return f"{'a mapping' if isinstance(value, dict) else 'a list'} of {len(value):,} entries"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
