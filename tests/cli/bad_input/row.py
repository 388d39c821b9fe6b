"""A row of a table of mistakes, and the broken images and model folders that several tables use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bad_input_support import Place

Arguments = Callable[[Place], list[Any]]
PNG = b"\x89PNG\r\n\x1a\n"
QKV = "layers.0.self_attn.q_proj.weight"
HUB = "some-lab/some-model"
FOLDER = "config.json and model.safetensors"


@dataclass(frozen=True)
class Row:
    """One mistake: the arguments that make it, the exit status, and what the line must say."""

    arguments: Arguments
    status: int
    says: tuple[str, ...]
    output_stays: bool = False
    """The folder `out` was there before, and is what the line is about."""


def sample(**fields: Any) -> dict[str, Any]:
    return {"id": "s1", "image": "good.png", "question": "what", "answer": "a", **fields}


BAD = sample(image="bad.png")


def cut_image(place: Place, name: str) -> str:
    """A PNG without its last half."""
    place.image(name, 64, 64)
    path = place.folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return name


def the(name: str) -> Callable[[Place], Any]:
    """A folder of the tiny models by name."""
    return lambda place: getattr(place.models, name)


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def extra(tensors: dict[str, Any]) -> None:
    tensors["surplus.weight"] = torch.zeros(2)


def misshaped(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = torch.zeros(3, 5)

    return change


def broken(model: str, change: Callable[[dict[str, Any]], Any], prefix: str = "") -> Callable[[Place], str]:
    return lambda place: prefix + place.tampered(getattr(place.models, model), change)


def cut_weights(place: Place, model: str) -> str:
    """A copy of a model folder with half of its weights."""
    whole = (getattr(place.models, model) / "model.safetensors").read_bytes()
    return place.file_of(model, "model.safetensors", whole[: len(whole) // 2], name="cut")
