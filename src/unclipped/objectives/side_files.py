"""Files of what was trained and is saved beside an encoder: description, weights and tokenizer in one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from unclipped.core.documents import read_json
from unclipped.core.errors import CheckpointError
from unclipped.core.files import whole_folder, write_json
from unclipped.encoders.checkpoint import quiet, raise_misfits
from unclipped.encoders.weights import read_safetensors
from unclipped.models.language import load_tokenizer

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
    return parsed, tensors, load_tokenizer(side)


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
    fields = read_json(path, error=CheckpointError, remedy="save it again")
    try:
        parsed = parse(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a ValidationError is a ValueError
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the description of {what} ({reason}); save it again") from None
    return parsed, read_safetensors(side / f"{side.name}.safetensors")


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
