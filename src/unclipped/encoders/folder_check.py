"""Model folders of unknown origin: their JSON files are checked before a library reads them; no code of theirs runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unclipped.core.documents import kind_of, read_json
from unclipped.core.errors import CheckpointError, UnclippedError, nearest

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""The files that transformers reads of a folder; each holds one object."""
REMEDY = "the file may be cut: fetch or save the folder again"
_ADAPTER = "adapter_config.json"
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_ATTENTIONS = ("eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", *ALL_ATTENTION_FUNCTIONS)
MAX_SIZE = 1 << 26
"""Largest whole number that a size of a configuration may be; vocabularies reach a million, contexts ten."""
MAX_LAYERS = 10_000
_SIZES = ("_size", "_dim", "_heads", "_embeddings", "_positions", "_channels", "_layers", "_experts", "_tokens")


def check_folder(folder: Path) -> None:
    """Raise CheckpointError, one line, for files of a model folder that no loader could use, or should.

    JSON that is cut, no object, too deep or has a key twice; an adapter in place of a model; an index that names files
    outside the folder; attention by code that is not installed; sizes beyond every model.
    """
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: holds an adapter ({_ADAPTER}), not a model alone; merge it into its model (PEFT's "
            "merge_and_unload) and save the result"
        )
    for name in JSON_FILES:
        path = folder / name
        if not path.exists():
            continue
        fields = read_json(path, error=CheckpointError, remedy=REMEDY)
        if name.endswith(".index.json"):
            _check_index(path, fields)
        elif name == "config.json":
            _check_config(path, fields)


def runs_own_code(where: Path | str) -> CheckpointError:
    """The refusal of a folder that brings code."""
    return CheckpointError(
        f"{where}: wants to run code of its own (auto_map), which is refused; give a model of a kind that "
        "transformers knows"
    )


@contextmanager
def reading(where: Path | str, problem: str, remedy: str) -> Iterator[None]:
    """Around one call of transformers that reads files: whatever it raises becomes a CheckpointError of one line."""

    try:
        yield
    except CheckpointError:
        raise
    except UnclippedError as error:  # of our own classes, which do not know the file
        raise CheckpointError(f"{where}: {error}") from error
    except BaseException as error:
        # A panic of the tokenizers library is no subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        if "custom code" in reason or "trust_remote_code" in reason:
            raise runs_own_code(where) from error
        raise CheckpointError(f"{where}: {problem} ({reason.rstrip('.')}); {remedy}") from error


def _check_index(path: Path, fields: dict[str, Any]) -> None:
    named = fields.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{path}: expected an object 'weight_map' from tensors to files; {REMEDY}")
    for tensor, name in named.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{path}: weight_map puts {tensor} into {name!r}, which is no file of this folder; give its plain name"
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: names {name}, which is missing in this folder; copy all files")


def _check_config(path: Path, fields: dict[str, Any]) -> None:
    if fields.get("transformers_weights") is not None:
        raise CheckpointError(f"{path}: transformers_weights names another file of weights; remove the field")
    for where, name, value in _fields(fields, ""):
        if name in _ATTENTION:
            for chosen in value.values() if isinstance(value, dict) else [value]:
                if chosen is not None and chosen not in _ATTENTIONS:
                    raise CheckpointError(
                        f"{path}: {where}: unknown attention {chosen!r}; {nearest(str(chosen), _ATTENTIONS)}"
                    )
        elif name == "model_type" and not isinstance(value, str):
            raise CheckpointError(f"{path}: {where}: expected text, found {kind_of(value)}; {REMEDY}")
        elif name.endswith(_SIZES) and isinstance(value, int | float):
            limit = MAX_LAYERS if name.endswith("_layers") else MAX_SIZE
            if not abs(value) <= limit:
                raise CheckpointError(f"{path}: {where} is {value}, the limit is {limit:,}; correct it")


def _fields(value: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """(place, name, value) of each field of an object and of the objects and lists in it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            place = f"{where}.{name}" if where else name
            yield place, name, inner
            yield from _fields(inner, place)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _fields(inner, f"{where}[{index}]")
