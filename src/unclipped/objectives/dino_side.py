"""The heads of a DINO teacher kept beside its encoder, so that a later pretraining can go on with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclipped.encoders.checkpoint import raise_misfits
from unclipped.objectives.dino_heads import DinoHead
from unclipped.objectives.side_files import fill_side, read_side_files, save_side

DINO_HEADS = "dino_heads"
_NAMES = ("dino_head", "ibot_head")
_LAYERS = {"0", "2", "4"}
"""Places of the linear layers among those of the MLP."""
# How the weight norm of the last layer is stored: gains and directions, by torch's older form and its newer one; or
# their product, once it was removed.
_GAINS = ("last_layer.weight_g", "last_layer.parametrizations.weight.original0")
_DIRECTIONS = ("last_layer.weight_v", "last_layer.parametrizations.weight.original1")
_PRODUCT = "last_layer.weight"


class DinoHeads(nn.Module):
    """What a teacher has beside its encoder. In each part: None when it has none."""

    mask_token: nn.Parameter | None

    def __init__(self, dino_head: DinoHead | None, ibot_head: DinoHead | None, mask_token: Tensor | None) -> None:
        """dino_head scores pooled features, ibot_head patches; mask_token (D,) stands for masked patches."""
        super().__init__()
        self.dino_head, self.ibot_head = dino_head, ibot_head
        self.mask_token = None if mask_token is None else nn.Parameter(mask_token.detach().reshape(-1).clone())

    def named_heads(self) -> dict[str, DinoHead]:
        """Those that there are, by `dino_head` and `ibot_head`."""
        return {name: head for name in _NAMES if (head := getattr(self, name)) is not None}


def sizes_of(head: DinoHead) -> dict[str, int]:
    """The arguments that build a head of this size."""
    first: Any = head.mlp[0]
    prototypes, bottleneck = head.direction.shape
    sizes = {"hidden": first.out_features, "bottleneck": bottleneck, "prototypes": prototypes}
    return {"width": first.in_features, **sizes}


def save_dino_heads(folder: Path, heads: DinoHeads) -> None:
    """Write `folder/dino_heads`: `dino_heads.safetensors`, and the heads' sizes in `dino_heads.json`."""
    token = heads.mask_token
    fields = {
        "heads": {name: sizes_of(head) for name, head in heads.named_heads().items()},
        "mask_token": None if token is None else token.numel(),
    }
    save_side(folder / DINO_HEADS, heads, None, fields)


def load_dino_heads(folder: str | Path) -> DinoHeads:
    """The heads of an encoder folder that `unclipped pretrain` (objective dinov2) or `unclipped import-encoder` wrote.

    Raises CheckpointError when the folder has none, or when its files do not fit each other.
    """
    side = Path(folder) / DINO_HEADS

    def parse(fields: dict[str, Any]) -> DinoHeads:
        if unknown := fields["heads"].keys() - set(_NAMES):
            raise KeyError(f"no such head: {sorted(unknown)[0]}")
        sizes = {name: {key: int(value) for key, value in given.items()} for name, given in fields["heads"].items()}
        made: dict[str, DinoHead] = {
            name: DinoHead(given.pop("width"), **given)  # type: ignore[arg-type] - a wrong key is what parse reports
            for name, given in sizes.items()
        }
        token = fields["mask_token"]
        return DinoHeads(made.get("dino_head"), made.get("ibot_head"), None if token is None else torch.zeros(token))

    heads, tensors = read_side_files(side, parse, what="DINO heads", objectives="dinov2, or `unclipped import-encoder`")
    fill_side(heads, tensors, side)
    return heads


def head_from_original(where: str, tensors: dict[str, Tensor], width: int) -> DinoHead | str:
    """A head as DINO, iBOT and DINOv2 store it, or why it has no place here: other layers than three, or batch norms.

    tensors: `mlp.0.weight`, …, `last_layer.weight_g` and `.weight_v` (or torch's newer names, or the product alone).
    width: of the features. Raises CheckpointError listing tensors that do not fit.
    """
    linear = {match[1] for name in tensors if (match := re.fullmatch(r"mlp\.(\d+)\.(?:weight|bias)", name))}
    if linear != _LAYERS or any("running_mean" in name for name in tensors):
        return f"a head of layers {', '.join(sorted(linear)) or 'none'}; heads here have three, without batch norms"
    gains, directions = (next((name for name in names if name in tensors), None) for names in (_GAINS, _DIRECTIONS))
    if _PRODUCT in tensors and gains is None and directions is None:
        direction = tensors[_PRODUCT]
        last = {_PRODUCT: direction.shape}
        gain = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    else:
        directions, gains = directions or _DIRECTIONS[0], gains or _GAINS[0]
        direction, gain = (tensors.get(name, torch.empty(0, 0)) for name in (directions, gains))
        last = {directions: direction.shape, gains: torch.Size((len(direction), 1))}
    hidden, bottleneck = (len(tensors.get(f"mlp.{layer}.bias", [])) for layer in (0, 4))
    expected: dict[str, torch.Size] = {
        "mlp.0.weight": torch.Size((hidden, width)),
        "mlp.0.bias": torch.Size((hidden,)),
        "mlp.2.weight": torch.Size((hidden, hidden)),
        "mlp.2.bias": torch.Size((hidden,)),
        "mlp.4.weight": torch.Size((bottleneck, hidden)),
        "mlp.4.bias": torch.Size((bottleneck,)),
        **last,
    }
    if direction.ndim == 2 and len(direction):
        expected[next(iter(last))] = torch.Size((len(direction), bottleneck))
    raise_misfits(
        where,
        sorted(expected.keys() - tensors.keys()),
        sorted(tensors.keys() - expected.keys()),
        [
            f"{name} (found {tuple(value.shape)}, expected {tuple(expected[name])})"
            for name, value in tensors.items()
            if name in expected and value.shape != expected[name]
        ],
        remedy="give the whole file of one model",
    )
    head = DinoHead(width, hidden=hidden, bottleneck=bottleneck, prototypes=len(direction))
    state = {name: value for name, value in tensors.items() if name.startswith("mlp.")}
    head.load_state_dict(state | {"direction": direction, "gain": gain.reshape(-1)})
    return head
