"""Features of other processes, with gradients that go back to where the features came from.

A loss of one process then depends on features of all. Its gradients reach every process that contributed, summed over
the losses; averaging parameters' gradients over processes afterwards, as data parallelism does, gives the gradient of
the mean loss. Without a process group each function is the identity of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """Processes that exchange features."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this is."""
    return dist.get_rank() if num_processes() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(num_processes())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)  # (processes · B, D)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(num_processes())[process_index()]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, D) of all processes in the order of the processes: (processes · B, D). B must be equal everywhere."""
    return rows if num_processes() == 1 else _Gather.apply(rows)  # type: ignore[return-value]


def _shift(block: Tensor, step: int) -> Tensor:
    """Send `block` to the process `step` places on, receive that of the process `step` places back."""
    processes, own = num_processes(), process_index()
    block = block.contiguous()
    received = torch.empty_like(block)
    requests = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, block, (own + step) % processes),
            dist.P2POp(dist.irecv, received, (own - step) % processes),
        ]
    )
    for request in requests:
        request.wait()
    return received


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Tensor) -> Tensor:
        return _shift(block, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _shift(gradients[0], -1)


def pass_on(block: Tensor) -> Tensor:
    """Give `block` to the next process of the ring and take that of the previous one, which must be of equal shape."""
    return block if num_processes() == 1 else _PassOn.apply(block)  # type: ignore[return-value]
