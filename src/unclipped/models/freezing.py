"""Which part a parameter belongs to, what is trained, and how many parameters that is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from unclipped.core.errors import UsageError, nearest

PARTS = ("vision", "connector", "text")
_PART_OF_MODULE = {"vision_tower": "vision", "connector": "connector", "language_model": "text", "lm_head": "text"}


def part_of(parameter_name: str) -> str:
    """The part ("vision", "connector" or "text") of a parameter by its name, with or without wrappers in front.

    Raises UsageError for a name that is in no part.
    """
    for piece in parameter_name.split("."):
        if piece in _PART_OF_MODULE:
            return _PART_OF_MODULE[piece]
    raise UsageError(f"parameter '{parameter_name}' is in none of the parts {', '.join(PARTS)}")


def set_trainable(model: nn.Module, parts: Iterable[str]) -> None:
    """Train exactly these parts and freeze the others. A frozen vision tower leaves training mode at once.

    Raises UsageError for an unknown part.
    """
    wanted = set(parts)
    for part in sorted(wanted - set(PARTS)):
        raise UsageError(f"unknown part '{part}'; {nearest(part, PARTS)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in wanted)
    model.train(model.training)  # the tower puts itself into the mode that fits


def parameter_table(model: nn.Module) -> list[dict[str, Any]]:
    """Rows of {"part", "total", "trainable"} in parameters, a shared tensor counted once, and a last row "all"."""
    rows = {part: {"part": part, "total": 0, "trainable": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        row = rows[part_of(name)]
        row["total"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    total = {
        "part": "all",
        "total": sum(row["total"] for row in rows.values()),
        "trainable": sum(row["trainable"] for row in rows.values()),
    }
    return [*rows.values(), total]
