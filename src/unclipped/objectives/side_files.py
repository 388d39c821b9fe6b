"""Files of what was trained and is saved beside an encoder: description, weights and tokenizer in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from unclipped.core.errors import CheckpointError, first_line
from unclipped.core.files import whole_folder, write_json
from unclipped.encoders.checkpoint import quiet, raise_misfits

_TRUNK = "trunk."

T = TypeVar("T")


def save_side(side: Path, model: nn.Module, tokenizer: Any, fields: dict[str, Any]) -> None:
    """Write the folder `side`: everything of `model` but its trunk, which the encoder's folder holds, the tokenizer
    unless it is None, and `fields` as the description."""
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(_TRUNK)
    }
    with whole_folder(side) as temporary, quiet():
        save_file(tensors, temporary / f"{side.name}.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_json(temporary / f"{side.name}.json", fields)


def read_side(
    side: Path, parse: Callable[[dict[str, Any]], T], *, what: str, objectives: str
) -> tuple[T, dict[str, Tensor], Any]:
    """What `parse` makes of the description, the tensors and the tokenizer of the folder `side`; see `read_side_files`.

    Raises CheckpointError when there is none, or when it cannot be read.
    """
    parsed, tensors = read_side_files(side, parse, what=what, objectives=objectives)
    try:
        return parsed, tensors, AutoTokenizer.from_pretrained(side)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{side}: cannot be read ({first_line(error)}); save it again") from None


def read_side_files(
    side: Path, parse: Callable[[dict[str, Any]], T], *, what: str, objectives: str
) -> tuple[T, dict[str, Tensor]]:
    """What `parse` makes of the description, and the tensors of the folder `side`.

    what: the name of such a folder in messages. objectives: those that write one. Raises CheckpointError when there is
    none, or when it cannot be read.
    """
    path = side / f"{side.name}.json"
    if not path.is_file():
        raise CheckpointError(
            f"{side.parent}: no {side.name}/{path.name} in this folder; expected what `unclipped pretrain` writes with "
            f"objective {objectives}"
        )
    try:
        parsed = parse(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the description of {what} ({reason}); save it again") from None
    try:
        return parsed, load_file(side / f"{side.name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{side}: cannot be read ({first_line(error)}); save it again") from None


def fill_side(model: nn.Module, tensors: dict[str, Tensor], side: Path) -> None:
    """Load tensors of `side` into all of `model` but its trunk. Raises CheckpointError listing those that misfit."""
    own = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(_TRUNK)}
    raise_misfits(
        str(side / f"{side.name}.safetensors"),
        sorted(own.keys() - tensors.keys()),
        sorted(tensors.keys() - own.keys()),
        [
            f"{name} (found {tuple(value.shape)}, expected {tuple(own[name])})"
            for name, value in tensors.items()
            if name in own and value.shape != own[name]
        ],
    )
    model.load_state_dict(tensors, strict=False)
