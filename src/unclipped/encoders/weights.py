"""Weights files of unknown origin: read without running what is in them, and only for finite floating-point values."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from unclipped.core.documents import read_json, regular_file
from unclipped.core.errors import CheckpointError, guarded

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that weights may be stored in: what they hold does not change when they become float32."""
WEIGHTS_FILES = "a .pth or .pt file of tensors, or a .safetensors file"
_SAFETENSORS_FLOATS = {"F32", "F16", "BF16", "F64"}
# Counters and tables that some checkpoints hold beside their weights; models make their own.
_TABLES = re.compile(r"(^|\.)(position_ids|token_type_ids|num_batches_tracked|relative_position_index|masked_bias)$")
_ATTENTION_MASKS = re.compile(r"(^|\.)attn(\.attention)?\.bias$")


class StoredTensor(NamedTuple):
    """One tensor of a weights file, without its values."""

    file: Path
    dtype: str
    """Name of its type, `float32`, `int8` and so on, or safetensors' own name of one that torch does not know."""
    is_float: bool
    values: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by their names in the files, from the files' headers.

    Only the files that transformers would load are read. Raises CheckpointError when there are none, or one is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            found |= _header(path)
        else:
            stored = read_pickled(path)
            if not isinstance(stored, Mapping):
                raise CheckpointError(f"{path}: holds a {type(stored).__name__}, not named tensors; save it again")
            for name, value in stored.items():
                if isinstance(value, Tensor):
                    found[str(name)] = StoredTensor(path, _name(value.dtype), value.dtype in FLOATS, value.numel())
    return found


def weight_files(folder: Path) -> list[Path]:
    """The weights files of a folder in the order in which transformers looks for them; at least one.

    Raises CheckpointError when there are none. The indexes of split weights were checked with the folder.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        if (index := folder / f"{whole}.index.json").is_file():
            return sorted({folder / name for name in read_json(index, error=CheckpointError)["weight_map"].values()})
    raise CheckpointError(
        f"{folder}: weights cannot be read (no model.safetensors in this folder); expected a folder that holds "
        "config.json and model.safetensors (as save_pretrained writes it)"
    )


def _header(path: Path) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    remedy = "expected a folder that holds config.json and model.safetensors (as save_pretrained writes it)"
    with (
        guarded(
            lambda reason: CheckpointError(
                f"{path.parent}: weights cannot be read ({path.name}: {reason}); {remedy}: fetch or save it again"
            )
        ),
        safe_open(path, framework="pt") as tensors,
    ):
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            entry = tensors.get_slice(name)
            values = 1
            for side in entry.get_shape():
                values *= side
            dtype = str(entry.get_dtype())
            found[name] = StoredTensor(path, _SAFETENSORS_NAMES.get(dtype, dtype), dtype in _SAFETENSORS_FLOATS, values)
    return found


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read as weights ({reason}); the file is damaged: fetch or save it again")


_SAFETENSORS_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}  # fmt: skip


def read_safetensors(path: Path, *, check: bool = True) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises CheckpointError when it is damaged.

    Without `check` they may be of any type and hold anything; whoever takes some of them calls `check_values`.
    """
    regular_file(path, CheckpointError)
    with guarded(lambda reason: _damaged(path, reason)):
        tensors = load_file(path)
    if check:
        check_values(str(path), tensors)
    return tensors


def read_pickled(path: Path) -> Any:
    """What torch saved in a file. Nothing in it is run: tensors and plain values are read, all else is refused."""
    try:
        # Training scripts store their arguments so; it holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError:
        raise
    except Exception as error:
        asked = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if asked is not None:
            raise CheckpointError(
                f"{path}: asks to run '{asked[1]}' when it is loaded, which is refused; save its tensors alone, "
                "in a Python that may run what the file asks for"
            ) from error
        # What the readers say of a file that is cut or of another kind is about their insides.
        raise CheckpointError(
            f"{path}: cannot be read as weights; expected {WEIGHTS_FILES}, whole: fetch or copy it again"
        ) from error


def check_stored(stored: Mapping[str, StoredTensor], left_out: Iterable[str], ignored: Iterable[str]) -> None:
    """Raise CheckpointError naming the tensors of a model folder that are not floating point.

    left_out: tensors that the model did not take. ignored: regular expressions of names that its class passes over.
    """
    passed = set(left_out)
    wrong = {
        name: tensor.dtype
        for name, tensor in stored.items()
        if not tensor.is_float
        and name not in passed
        and not (_TABLES.search(name) or _ATTENTION_MASKS.search(name))
        and not any(re.search(pattern, name) for pattern in ignored)
    }
    if wrong:
        raise _unusable(str(stored[next(iter(wrong))].file), wrong)


def check_values(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError naming the tensors that are not floating point, or hold a NaN or an infinity."""
    wrong = {name: problem for name, value in tensors.items() if (problem := _problem(value))}
    if wrong:
        raise _unusable(where, wrong)


def check_model(where: str, model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError naming the parameters and saved buffers of a model that hold a NaN or an infinity."""
    state = {name: value for name, value in model.state_dict().items() if value.dtype in FLOATS}
    wrong = {name: problem for name, value in state.items() if (problem := _problem(value))}
    if not wrong:
        return
    for path in sorted({tensor.file for tensor in stored.values()}):  # the names and the file that the user knows
        tensors = read_safetensors(path, check=False) if path.suffix == ".safetensors" else read_pickled(path)
        floats = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.dtype in FLOATS}
        check_values(str(path), floats)
    raise _unusable(where, wrong)  # not stored so: made of the configuration


def _problem(value: Tensor) -> str | None:
    if value.dtype not in FLOATS:
        return _name(value.dtype)
    if value.numel() == 0 or value.is_meta:
        return None
    low, high = (bound.item() for bound in value.detach().aminmax())  # one pass, no copy; NaN comes through
    if low != low:
        return "NaN"
    return "infinity" if low == -torch.inf or high == torch.inf else None


def _unusable(where: str, wrong: Mapping[str, str]) -> CheckpointError:
    names = [f"{name} ({problem})" for name, problem in wrong.items()]
    rest = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return CheckpointError(
        f"{where}: {len(names)} tensors cannot be used as weights: {', '.join(names[:5])}{rest}; give finite values "
        "of float32, float16 or bfloat16"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
