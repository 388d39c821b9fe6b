"""Weights files of other code: read without running what is in them, and sorted into encoder, heads and the rest.

The names are those of the published code of DINOv2 and Web-SSL (a backbone alone, or the teacher and student of a
training with their heads), of DINO, and of MAE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unclipped.core.errors import CheckpointError
from unclipped.encoders.checkpoint import shortened
from unclipped.encoders.weights import WEIGHTS_FILES, read_pickled, read_safetensors

_SIDES = ("teacher", "student")
_CONTAINERS = ("model", "state_dict", "module")
# What wrappers of distributed training and compilation put into names.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BACKBONE = "backbone."
_HEADS = re.compile(r"(?:(dino_head|ibot_head)|head(?=\.(?:mlp|last_layer)\.))\.(.+)")
_LOSSES = ("dino_loss.", "ibot_patch_loss.", "koleo_loss.")


@dataclass
class OriginalWeights:
    """The tensors of one file, sorted by what they belong to. Names are without wrappers and prefixes."""

    path: Path
    encoder: dict[str, Tensor] = field(default_factory=dict)
    """The encoder's, and what else stands beside them: a decoder, a classifier."""
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By head, `dino_head` and `ibot_head`: its tensors."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name in the file → why it is not taken."""


def read_weights(path: str | Path, side: str | None = None) -> OriginalWeights:
    """The sorted tensors of a file. side: `teacher` or `student` of a training; None: the teacher where there is one.

    Raises CheckpointError for what is no file of tensors, for one whose loading would run code, when there is no such
    side, and when two tensors have one name.
    """
    path = Path(path).expanduser()
    found = OriginalWeights(path)
    tensors, sides = _chosen(_stored(path), side, found)
    if not sides:
        tensors, sides = _one_side(tensors, side, found)
    if side is not None and not sides:
        raise CheckpointError(f"{path}: holds no {side} (and no sides at all); leave --weights out")
    has_backbone = any(name.startswith(_BACKBONE) for name in tensors)
    for name, value in tensors.items():
        head = _HEADS.fullmatch(name)
        if head is not None:
            found.heads.setdefault(head[1] or "dino_head", {})[head[2]] = value
        elif name.startswith(_LOSSES):
            found.left_out[name] = "running values of a loss"
        else:
            found.encoder[name.removeprefix(_BACKBONE) if has_backbone else name] = value
    return found


def _stored(path: Path) -> Any:
    """What the file holds, as it was saved. Nothing in it is run: only tensors and plain values are read."""
    if path.is_dir():
        raise CheckpointError(
            f"{path}: is a folder; expected {WEIGHTS_FILES} (a folder that transformers loads needs no import)"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected {WEIGHTS_FILES}")
    return read_safetensors(path, check=False) if path.suffix == ".safetensors" else read_pickled(path)


def _chosen(stored: Any, side: str | None, found: OriginalWeights) -> tuple[dict[str, Tensor], bool]:
    """The innermost mapping of names to tensors, and whether it is that of one side."""
    has_side = False
    while True:
        if not isinstance(stored, Mapping):
            raise CheckpointError(
                f"{found.path}: holds a {type(stored).__name__}, not named tensors; expected {WEIGHTS_FILES}"
            )
        if any(isinstance(value, Tensor) for value in stored.values()):
            return _tensors(stored, found), has_side
        inner = {str(key): value for key, value in stored.items() if isinstance(value, Mapping)}
        wanted = (side,) if side is not None else _SIDES
        key = next((name for name in (*wanted, *_CONTAINERS) if inner.get(name)), None)
        if key is None:
            listed = shortened([str(name) for name in stored]) or "nothing"
            other = [name for name in _SIDES if name in inner]
            remedy = f"; it has a {other[0]}: --weights {other[0]}" if other else ""
            raise CheckpointError(f"{found.path}: no tensors found; the file holds {listed}{remedy}")
        for name, value in stored.items():
            if name in _SIDES and name != key and isinstance(value, Mapping):
                found.left_out |= {f"{name}.{inner_name}": _other(str(name)) for inner_name in value}
            elif name != key:
                found.left_out[str(name)] = "no weights of the model"
        has_side = has_side or key in _SIDES
        stored = inner[key]


def _tensors(stored: Mapping[Any, Any], found: OriginalWeights) -> dict[str, Tensor]:
    """The tensors under names without wrappers."""
    tensors: dict[str, Tensor] = {}
    for key, value in stored.items():
        name = _WRAPPERS.sub("", str(key))
        if not isinstance(value, Tensor):
            found.left_out[str(key)] = "no tensor"
        elif name in tensors:
            raise CheckpointError(f"{found.path}: two tensors named {name}; save those of one model alone")
        else:
            tensors[name] = value
    return tensors


def _one_side(tensors: dict[str, Tensor], side: str | None, found: OriginalWeights) -> tuple[dict[str, Tensor], bool]:
    """Of names that begin with `teacher.` or `student.` those of one side, without that beginning."""
    there = [name for name in _SIDES if any(key.startswith(f"{name}.") for key in tensors)]
    if not there:
        return tensors, False
    taken = side or there[0]
    if taken not in there:
        raise CheckpointError(f"{found.path}: holds no {taken}; it has a {there[0]}: --weights {there[0]}")
    kept: dict[str, Tensor] = {}
    for name, value in tensors.items():
        owner, _, rest = name.partition(".")
        if owner == taken:
            kept[rest] = value
        elif owner in _SIDES:
            found.left_out[name] = _other(owner)
        else:
            kept[name] = value
    return kept, True


def _other(side: str) -> str:
    return f"the {side}'s; --weights {side} takes them"
