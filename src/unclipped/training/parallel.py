"""Several processes: sums over ranks, FSDP2 sharding and whole state dicts from shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from unclipped.training.device import repeated_blocks

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Each scalar summed over all processes, in one message."""
    if not is_distributed() or not values:
        return dict(values)
    names = sorted(values)
    stacked = torch.stack(
        [
            values[name].to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
            for name in names
        ]
    )  # (names,)
    dist.all_reduce(stacked)
    return {name: stacked[i].to(values[name].dtype) for i, name in enumerate(names)}


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    if not is_distributed():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()


def shard(objective: ModuleT) -> ModuleT:
    """Shard parameters of every block, then of the rest, with FSDP2 over all processes, in place."""
    from torch.distributed.fsdp import fully_shard

    for block in repeated_blocks(objective):
        fully_shard(block)
    fully_shard(objective)
    # The Trainer then neither wraps nor shards the module again.
    objective.is_distributed_loading_by_transformers = True  # type: ignore[assignment]
    return objective


def whole(value: Any) -> Any:
    """A copy on the CPU with sharded tensors gathered, through nested containers. All processes must call it alike."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def shard_optimizer_state(state_dict: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Cut the whole tensors of an optimiser's state dict like the parameters they belong to, in the dict's order."""
    state = {}
    for index, entries in state_dict["state"].items():
        parameter = parameters[index]
        state[index] = {
            key: distribute_tensor(item, parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor) and isinstance(item, Tensor) and item.shape == parameter.shape
            else item
            for key, item in entries.items()
        }
    return state_dict | {"state": state}


def load_whole(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module whose parameters may be sharded. Names must match exactly."""
    own = module.state_dict()
    cut = {
        name: distribute_tensor(value, own[name].device_mesh, own[name].placements)
        if isinstance(own.get(name), DTensor)
        else value
        for name, value in state_dict.items()
    }
    module.load_state_dict(cut, strict=True)
