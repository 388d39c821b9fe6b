"""Clipping the gradient of each sub-module by itself, as DINOv2 does (arXiv 2304.07193): one cannot silence another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unclipped.objectives.base import Objective


def parameters_by_module(objective: Objective) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by the sub-module that `objective.module_of` names, in the order of the model."""
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            modules.setdefault(objective.module_of(name), []).append(parameter)
    return modules


def clip_each(modules: dict[str, list[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
    """Scale down, in place, the gradients of every module whose norm is above `max_norm`; norms before that.

    Gradients may be sharded over processes; norms are those of the whole modules. All processes must call it alike.
    """
    norms = {}
    for name, parameters in modules.items():
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def joint_norm(norms: dict[str, Tensor]) -> Tensor:
    """Norm of the gradient of all modules together."""
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))
