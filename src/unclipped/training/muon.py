"""Muon that is fast where bfloat16 is not: torch's own on accelerators, float32 and batched by shape on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """Approximate U Vᵀ of each matrix by the quintic Newton–Schulz iteration, in the dtype given.

    matrices: (n, rows, columns); returns the same shape. Source: K. Jordan, "Muon: An optimizer for hidden layers in
    neural networks" (2024): X ← aX + (bA + cA²)X with A = XXᵀ, started at X / ‖X‖ (Frobenius).
    """
    a, b, c = coefficients
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if is_tall else matrices  # (n, short, long): the Gram matrix is the small one
    x = x / x.flatten(1).norm(dim=1).clamp(min=epsilon)[:, None, None]
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)  # (n, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon with one difference: matrices on a CPU are orthogonalised in float32, equal shapes together.

    torch iterates in bfloat16, which a CPU without bfloat16 matrix units emulates some fifty times slower than
    float32. The updates agree with torch's to bfloat16's precision. Same arguments, same state.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. Parameters on other devices take torch's own step."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        momenta: list[Tensor] = []
        self._init_group(group, parameters, gradients, momenta)
        by_shape: dict[torch.Size, list[int]] = {}
        for index, parameter in enumerate(parameters):
            by_shape.setdefault(parameter.shape, []).append(index)
        rate, momentum = float(group["lr"]), group["momentum"]
        for shape, indices in by_shape.items():
            updates = []
            for index in indices:
                gradient, buffer = gradients[index], momenta[index]
                buffer.lerp_(gradient, 1 - momentum)
                updates.append(gradient.lerp(buffer, momentum) if group["nesterov"] else buffer)
            stacked = torch.stack([update.float() for update in updates])  # (n, rows, columns)
            directions = orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
            adjusted = rate * _shape_factor(group["adjust_lr_fn"], shape)
            for index, direction in zip(indices, directions, strict=True):
                parameters[index].mul_(1 - rate * group["weight_decay"])
                parameters[index].add_(direction.to(parameters[index].dtype), alpha=-adjusted)


def _shape_factor(rule: str | None, shape: torch.Size) -> float:
    """Factor on the learning rate for a matrix of `shape` (rows, columns): Jordan's rule, or Moonshot's."""
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
