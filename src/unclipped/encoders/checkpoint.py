"""Checkpoint folders: where they are, what they say, and strict loading of one transformers model from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from unclipped.core.errors import CheckpointError, first_line

# Root files only, and one set of weights: repositories often hold the same tensors several times.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
HUB_SKIPPED = ["*/*", "consolidated*"]
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FOLDER_FORM = "a folder that holds config.json and model.safetensors (as save_pretrained writes it)"


def checkpoint_folder(source: str | Path) -> Path:
    """The local folder of a checkpoint: `source` itself, or the hub's files when it is a hub id.

    Raises CheckpointError when the folder has no config.json, or when there is neither folder nor reachable hub id.
    """
    if not str(source):
        raise CheckpointError(f"no model is named; give {FOLDER_FORM}, or a hub id")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json in this folder; expected {FOLDER_FORM}")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; expected {FOLDER_FORM}")
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: no such folder; expected {FOLDER_FORM}")
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no such folder, and it could not be fetched as a hub id ({first_line(error).split('. ')[0]}); "
            f"without network give {FOLDER_FORM}"
        ) from None


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder. Raises CheckpointError when it is broken or of an unknown kind."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: cannot be read as a model configuration ({first_line(error).rstrip('.')}); "
            "fetch it again, or give a checkpoint of a kind that transformers knows"
        ) from None


def load_model(
    folder: Path,
    config: PreTrainedConfig,
    *,
    may_drop: Iterable[str] = (),
    may_lack: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **model_arguments: Any,
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """Load the model of `config` from `folder`; returns it with the names of dropped and of new tensors.

    `may_drop` and `may_lack` are regular expressions of tensors that may be left over or absent. Raises
    CheckpointError that lists every other missing, unexpected or misshaped tensor.
    """
    if attn_implementation is not None:
        model_arguments["attn_implementation"] = attn_implementation
    try:
        with quiet():
            model, info = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed below with all the others, and raised
                **model_arguments,
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: weights cannot be read ({first_line(error)}); expected {FOLDER_FORM}"
        ) from None
    missing = [name for name in sorted(info["missing_keys"]) if not matches(name, may_lack)]
    extra = [name for name in sorted(info["unexpected_keys"]) if not matches(name, may_drop)]
    misshaped = [
        f"{name} (found {tuple(found)}, expected {tuple(expected)})"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    misnamed = {entry.split(" ")[0] for entry in misshaped}
    raise_misfits(str(folder), [name for name in missing if name not in misnamed], extra, misshaped)
    return model, sorted(info["unexpected_keys"]), sorted(info["missing_keys"])


def raise_misfits(
    where: str,
    missing: list[str],
    extra: list[str],
    misshaped: list[str],
    *,
    remedy: str = "config.json and weights must come from one checkpoint: save or fetch it again",
) -> None:
    """Raise CheckpointError listing tensors that do not fit; do nothing when all three lists are empty."""
    kinds = {"missing": missing, "unexpected": extra, "misshaped": misshaped}
    listed = [f"{kind} {len(names)}: {shortened(names)}" for kind, names in kinds.items() if names]
    if listed:
        raise CheckpointError(f"{where}: tensors do not fit the model: {'; '.join(listed)}; {remedy}")


def shortened(names: list[str], most: int = 20) -> str:
    """The names, or the first `most` of them and how many follow."""
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def stored_values(folder: Path) -> int | None:
    """Number of values in the folder's safetensors files, from their headers; None when it has no such files."""
    files = sorted(folder.glob("model*.safetensors"))
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total if files else None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True when one of the regular expressions occurs in the name."""
    return any(re.search(pattern, name) for pattern in patterns)


def pixel_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """(mean, std, file name) that the folder's image processor states, or None when it states none.

    Raises CheckpointError when the file is not JSON or the two do not belong together.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error.msg}, line {error.lineno})") from None
        fields = fields.get("image_processor", fields)
        mean, std = fields.get("image_mean", fields.get("mean")), fields.get("image_std", fields.get("std"))
        if mean is None or std is None:
            continue
        mean, std = ([value] if isinstance(value, int | float) else value for value in (mean, std))
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise CheckpointError(f"{path}: image_mean {mean} and image_std {std} do not belong together")
        return tuple(map(float, mean)), tuple(map(float, std)), name
    return None


def stated_licence(folder: Path) -> str | None:
    """The `license` field of the model card's header, when the folder has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    field = re.search(r"^license:[ \t]*(\S.*)$", header.group(1), flags=re.MULTILINE) if header else None
    return field.group(1).strip().strip("'\"") if field else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's own load tables: what they say is checked, raised or reported here."""
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
