"""torch.optim.Muon with the orthogonalisation in the number format that the device multiplies fast, and on shards.

torch computes the Newton–Schulz iteration in bf16 everywhere. On CPUs without bf16 arithmetic that is twenty to fifty
times slower than fp32 and dominates the step of a small model; on CUDA bf16 is right. Constructor, state and result
(up to rounding) are those of torch's class.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """Move the singular values of each matrix near one, keeping its singular vectors, in the number format given.

    `matrices`: (count, rows, columns) -> the same shape. Source: K. Jordan, "Muon: An optimizer for hidden layers in
    neural networks" (2024): X ← aX + (bA + cA²)X with A = XXᵀ, started at X / ‖X‖ (Frobenius).
    """
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # (count, short, long): the product below is then the smaller one
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT  # (count, short, short)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """Momentum whose update is orthogonalised; see `torch.optim.Muon` for the arguments.

    Sharded parameters (FSDP2): the momentum stays sharded, each process orthogonalises the whole gathered update and
    keeps its own piece, so the result is that of one process.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. Returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                update = self._momentum_update(parameter, group)
                # One batched product for alike matrices saves launches on CUDA; on the CPU it only costs copies.
                key = (parameter.shape, parameter.device) if parameter.device.type == "cuda" else index
                by_shape[key].append((parameter, update))
            for pairs in by_shape.values():
                self._apply(pairs, group)
        return loss

    def _momentum_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Advance the momentum of one parameter; returns the whole update before orthogonalisation, (rows, columns)."""
        gradient, state, momentum = parameter.grad, self.state[parameter], group["momentum"]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        return update.full_tensor() if isinstance(update, DTensor) else update

    @staticmethod
    def _apply(pairs: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        """Orthogonalise the updates of equally shaped parameters and take the step."""
        stacked = torch.stack([update for _, update in pairs]) if len(pairs) > 1 else pairs[0][1].unsqueeze(0)
        stacked = stacked.to(torch.bfloat16 if stacked.device.type == "cuda" else torch.float32)
        directions = orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = stacked.shape[-2:]
        rate = group["lr"] * _shape_factor(group["adjust_lr_fn"], rows, columns)
        for (parameter, _), direction in zip(pairs, directions, strict=True):
            if isinstance(parameter, DTensor):
                whole = DTensor.from_local(direction, parameter.device_mesh, [Replicate()])
                direction = whole.redistribute(placements=parameter.placements)  # each process keeps its piece
            direction = direction.to(parameter.dtype)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-rate)


def _shape_factor(rule: str | None, rows: int, columns: int) -> float:
    """Factor on the learning rate for a matrix, as torch defines the two rules."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
