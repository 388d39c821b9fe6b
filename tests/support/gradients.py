"""Analytic gradients of a whole objective's loss against finite differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_true_gradients(objective: torch.nn.Module, batch: dict[str, Any]) -> bool:
    """Whether the loss of `objective`, in float64, has the gradients of its finite differences for all parameters.

    One random direction a parameter. A failure raises, with both values.
    """
    names, values = [], []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            names.append(name)
            values.append(parameter.detach().clone().requires_grad_())

    def loss(*given: Tensor) -> Tensor:
        return torch.func.functional_call(objective, dict(zip(names, given, strict=True)), (), batch)["loss"]

    assert all(value.dtype == torch.float64 for value in values)
    return torch.autograd.gradcheck(loss, values, fast_mode=True)
