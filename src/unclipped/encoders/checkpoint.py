"""Checkpoint folders: where they are, what they say, and strict loading of one transformers model from them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from unclipped.core.documents import kind_of, read_json
from unclipped.core.errors import CheckpointError, guarded
from unclipped.encoders.folder_check import REMEDY, check_folder, reading, runs_own_code
from unclipped.encoders.weights import StoredTensor, check_model, check_stored, stored_tensors

# Root files only, and one set of weights: repositories often hold the same tensors several times.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
HUB_SKIPPED = ["*/*", "consolidated*"]
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Values that a model may have beyond twice those stored: parts that start fresh, such as a mask token.
_SLACK = 10_000_000
# Types whose values a conversion changes or cannot read: refused also where a tensor has no place in the model.
_NEVER = ("complex", "float8", "F8", "F6", "F4", "C64")
FOLDER_FORM = "a folder that holds config.json and model.safetensors (as save_pretrained writes it)"


def checkpoint_folder(source: str | Path) -> Path:
    """The local folder of a checkpoint: `source` itself, or the hub's files when it is a hub id.

    Raises CheckpointError when the folder has no config.json or holds files that no loader should read, or when there
    is neither folder nor reachable hub id.
    """
    if not str(source):
        raise CheckpointError(f"no model is named; give {FOLDER_FORM}, or a hub id")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json in this folder; expected {FOLDER_FORM}")
        check_folder(folder)
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; expected {FOLDER_FORM}")
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: no such folder; expected {FOLDER_FORM}")
    with guarded(
        lambda reason: CheckpointError(
            f"{source}: no such folder, and it could not be fetched as a hub id ({reason.split('. ')[0]}); "
            f"without network give {FOLDER_FORM}"
        )
    ):
        folder = Path(snapshot_download(str(source), allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED))
    check_folder(folder)
    return folder


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder. Raises CheckpointError when it is broken, of an unknown kind, or brings code."""
    path = folder / "config.json"
    fields = read_json(path, error=CheckpointError, remedy=REMEDY)
    if "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING:
        raise runs_own_code(path)
    remedy = "fetch it again, or give a checkpoint of a kind that transformers knows"
    with reading(path, "cannot be read as a model configuration", remedy), quiet():
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_weights(
    loader: Any, folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype | str, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """The model that a class of transformers (or an Auto class) loads from a checked folder, and its loading report.

    Every loader of models comes here: no code of the folder runs, and tensors that are no floats or not finite are
    refused by name. Raises CheckpointError when the weights cannot be read. Misfits are in the report.
    """
    stored = stored_tensors(folder)
    _check_amount(loader, folder, config, stored)
    check_stored({name: tensor for name, tensor in stored.items() if tensor.dtype.startswith(_NEVER)}, (), ())
    if hasattr(loader, "_model_mapping"):  # an Auto class; the others never run code of a folder
        arguments["trust_remote_code"] = False
    with reading(folder, "weights cannot be read", f"expected {FOLDER_FORM}"), quiet():
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed with all the others, and raised
            weights_only=True,
            **arguments,
        )
    check_stored(stored, info["unexpected_keys"], getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    check_model(str(folder), model, stored)
    return model, info


def _check_amount(loader: Any, folder: Path, config: PreTrainedConfig, stored: dict[str, StoredTensor]) -> None:
    """Raise CheckpointError when the configuration asks for far more than is stored, before memory is taken for it."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > len(stored):  # each layer has a tensor at least
            raise CheckpointError(
                f"{folder}: config.json asks for {layers:,} layers, the weights have {len(stored)} tensors; they must "
                "come from one checkpoint: save or fetch it again"
            )
    build = getattr(loader, "from_config", None) or loader._from_config
    with reading(folder, "config.json describes no model", REMEDY), quiet(), torch.device("meta"):  # shapes alone
        wanted = sum(parameter.numel() for parameter in build(copy.deepcopy(config)).parameters())
    found = sum(tensor.values for tensor in stored.values())
    if wanted > 2 * found + _SLACK:
        raise CheckpointError(
            f"{folder}: config.json describes a model of {wanted:,} values, the weights hold {found:,}; they must "
            "come from one checkpoint: save or fetch it again"
        )


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
    CheckpointError that lists every other missing, unexpected or misshaped tensor, and as `load_weights`.
    """
    if attn_implementation is not None:
        model_arguments["attn_implementation"] = attn_implementation
    model, info = load_weights(AutoModel, folder, config, dtype=dtype, **model_arguments)
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


def stored_values(folder: Path) -> int:
    """Number of values in the folder's weights files, from their headers."""
    return sum(tensor.values for tensor in stored_tensors(folder).values())


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
        fields = read_json(path, error=CheckpointError, remedy=REMEDY)
        inner = fields.get("image_processor", fields)
        if not isinstance(inner, dict):
            raise CheckpointError(f"{path}: image_processor: expected an object, found {kind_of(inner)}; {REMEDY}")
        mean, std = inner.get("image_mean", inner.get("mean")), inner.get("image_std", inner.get("std"))
        if mean is None or std is None:
            continue
        mean, std = (value if isinstance(value, list) else [value] for value in (mean, std))
        if not all(type(value) in (int, float) and math.isfinite(value) for value in [*mean, *std]):
            raise CheckpointError(f"{path}: image_mean {mean} and image_std {std} must be finite numbers; correct them")
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
