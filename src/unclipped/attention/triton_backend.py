"""Block plans on our own Triton kernels, for CUDA: forward and backward, without compiling for each length.

A plan's lists become compressed rows once and are kept with the plan, so a static pattern pays for them in one layer of
all. The span of a query block stands among its blocks behind the mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.plan import BlockPlan
from unclipped.core.errors import UsageError

SMALLEST_BLOCK = 16
"""Keys that a block must hold a multiple of: the least side of a matrix product on tensor cores."""
WIDEST_HEAD = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiling:
    """Sizes of one kernel's tiles; all are cut to the blocks of the plan."""

    rows: int
    """Queries times heads of the group."""
    columns: int
    """Keys."""
    masked: int
    """Keys of a tile behind the mask: small tiles waste less on the diagonal."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Tilings:
    """Of the three large kernels."""

    forward: Tiling
    query_gradient: Tiling
    key_gradient: Tiling


# Sized for sm_90 by what ptxas says: within its shared memory, and up to a width of 128 no spills. Not yet timed.
_HALF = {
    64: Tilings(Tiling(128, 128, 64, 8, 3), Tiling(128, 64, 64, 8, 3), Tiling(64, 64, 64, 4, 3)),
    128: Tilings(Tiling(128, 64, 64, 8, 3), Tiling(128, 64, 64, 8, 2), Tiling(64, 64, 64, 8, 2)),
    256: Tilings(Tiling(64, 32, 32, 4, 3), Tiling(64, 32, 32, 8, 2), Tiling(32, 32, 32, 4, 2)),
}
# Products in full float32 run outside the tensor cores: exact, and slow.
_SINGLE = {
    64: Tilings(Tiling(64, 32, 32, 8, 2), Tiling(32, 32, 32, 8, 2), Tiling(32, 32, 32, 8, 2)),
    128: Tilings(Tiling(32, 32, 32, 8, 2), Tiling(32, 32, 32, 8, 1), Tiling(32, 32, 32, 8, 1)),
    256: Tilings(Tiling(32, 16, 16, 4, 2), Tiling(16, 16, 16, 4, 1), Tiling(16, 16, 16, 4, 1)),
}
CHOSEN: dict[tuple[int, int], Tilings] = {}
"""By padded width and bytes of a number: what `benchmarks/sparse_prefill_gpu.py --tune` puts in the place of ours."""


def triton_attention(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, *, scale: float) -> Tensor:
    """query (1, H, M, d), key and value (1, Hkv, N, d) → (1, H, M, d); sums are formed in float32.

    Raises UsageError where Triton or a CUDA device is missing, for other types than float32, bfloat16 and float16, for
    heads wider than 256, key blocks of no multiple of 16 tokens, and a scale that is not above 0.
    """
    refuse_unsupported(query, key, value, plan, scale)
    return _BlockLists.apply(query, key, value, plan, scale)[0]  # type: ignore[index]


def triton_attention_and_sums(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, *, scale: float
) -> tuple[Tensor, Tensor]:
    """As `triton_attention`, with the natural log-sum-exp of each query's scores, float32 (1, H, M); no gradient."""
    refuse_unsupported(query, key, value, plan, scale)
    return _BlockLists.apply(query, key, value, plan, scale)  # type: ignore[return-value]


def is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, step by step (`TRITON_INTERPRET=1`): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_unsupported(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float) -> None:
    """Raise UsageError that says what the kernels cannot do."""
    if find_spec("triton") is None:
        raise UsageError(
            "backend triton: Triton is not installed (CPU builds of torch come without it); install a CUDA build of "
            "torch, or leave `backend` away"
        )
    if query.device.type != "cuda" and not is_interpreted():
        raise UsageError(
            f"backend triton runs on CUDA devices, the queries are on {query.device}; leave `backend` away, or set "
            "TRITON_INTERPRET=1 to run its kernels step by step on a CPU"
        )
    reason = reason_against_triton(query, key, value, key_block=plan.key_block, scale=scale)
    if reason is not None:
        raise UsageError(reason)


def reason_against_triton(query: Tensor, key: Tensor, value: Tensor, *, key_block: int, scale: float) -> str | None:
    """What the kernels cannot take of types, widths (…, d), key blocks in tokens and scale, with the remedy, or None.

    Says nothing of the machine: whether Triton and a device are there.
    """
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        found = ", ".join(str(states.dtype).removeprefix("torch.") for states in (query, key, value))
        return (
            f"backend triton takes float32, bfloat16 or float16, the same for all, found {found}; "
            "use backend='reference' for others"
        )
    if query.shape[-1] > WIDEST_HEAD:
        return f"backend triton takes heads of at most {WIDEST_HEAD}, found {query.shape[-1]}; use backend='flex'"
    if key_block % SMALLEST_BLOCK:
        return (
            f"backend triton takes key blocks of a multiple of {SMALLEST_BLOCK} tokens, found {key_block}; "
            "use backend='reference', or other blocks"
        )
    return None if scale > 0 else f"backend triton: scale must be above 0, found {scale:g}; use backend='reference'"


@dataclass(frozen=True)
class Lists:
    """Blocks listed for each row of a table, in compressed rows: int32 (rows + 1,) and (listed,)."""

    starts: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> Lists:
        """From bool (heads, rows, columns): the columns that are true, ascending."""
        starts = F.pad(chosen.sum(dim=-1).flatten().cumsum(dim=0), (1, 0))
        blocks = chosen.nonzero()[:, -1]
        if not len(blocks):
            blocks = starts.new_zeros(1)  # never read: a tensor without elements has no address
        return cls(starts.int(), blocks.int())


class PlanTables:
    """A plan as the kernels read it, on one device."""

    def __init__(self, plan: BlockPlan, device: torch.device) -> None:
        self.heads, self.query_blocks = plan.lists.shape[0], plan.blocks
        self.key_blocks = -(-plan.length // plan.key_block)
        numbers = torch.arange(self.query_blocks, device=plan.lists.device)[:, None] + plan.first_block
        span = torch.arange(self.key_blocks, device=plan.lists.device) // (plan.query_block // plan.key_block)
        diagonal = plan.is_diagonal.to(plan.lists.device)[:, None] & (numbers == span)  # (query blocks, key blocks)
        self._whole = self._chosen(plan.lists).to(device)
        self._masked = (self._chosen(plan.partial) | diagonal).to(device)
        self.begin, self.reach = plan.begin.to(device, torch.int32), plan.reach.to(device, torch.int32)
        self.whole, self.masked = Lists.of(self._whole), Lists.of(self._masked)

    @cached_property
    def by_key(self) -> tuple[Lists, Lists]:
        """The transposed lists: query blocks that see a key block whole, and behind the mask."""
        return Lists.of(self._whole.transpose(1, 2)), Lists.of(self._masked.transpose(1, 2))

    def _chosen(self, lists: Tensor) -> Tensor:
        """Lists as bool (heads, query blocks, key blocks)."""
        chosen = torch.zeros(*lists.shape[:2], self.key_blocks + 1, dtype=torch.bool, device=lists.device)
        places = torch.where(lists < 0, self.key_blocks, lists)  # fillers fall on the last, unused column
        return chosen.scatter_(2, places, value=True)[:, :, :-1]


_TABLES: WeakKeyDictionary[BlockPlan, dict[torch.device, PlanTables]] = WeakKeyDictionary()


def tables_of(plan: BlockPlan, device: torch.device) -> PlanTables:
    """The tables of a plan, built at the first call for each device."""
    held = _TABLES.setdefault(plan, {})
    if device not in held:
        held[device] = PlanTables(plan, device)
    return held[device]


def tilings_for(width: int, dtype: torch.dtype) -> Tilings:
    """Sizes of tiles for a head of `width`."""
    padded = padded_width(width)
    known = _SINGLE if dtype == torch.float32 else _HALF
    return CHOSEN.get((padded, dtype.itemsize)) or known[max(64, padded)]


def padded_width(width: int) -> int:
    """The power of two that a head's features are filled up to inside a kernel."""
    return max(16, 1 << (width - 1).bit_length())


class _BlockLists(torch.autograd.Function):
    """Output and log-sum-exp; the latter carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        call = _Call(query, key, value, plan, scale)
        output, sums = call.forward()
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(sums)
        return output, sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        return (*_Call(query, key, value, ctx.plan, ctx.scale).backward(gradients[0], output, sums), None, None)


class _Call:
    """Arguments that the kernels share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float) -> None:
        self.kernels: Any = import_module("unclipped.attention.triton_kernel")
        self.query, self.key, self.value = (_dense_features(states) for states in (query, key, value))
        self.plan, self.scale = plan, scale
        self.tables = tables_of(plan, query.device)
        self.key_heads, self.keys = key.shape[1], key.shape[2]
        self.group, self.width = query.shape[1] // key.shape[1], query.shape[3]
        self.before = plan.offset - plan.first_block * plan.query_block  # tokens of the first block without a query
        self.tilings = tilings_for(self.width, query.dtype)
        self.shape: dict[str, Any] = {
            "GROUP": self.group,
            "WIDTH": self.width,
            "PADDED": padded_width(self.width),
            "QUERY_BLOCK": plan.query_block,
            "KEY_BLOCK": plan.key_block,
            "WIDEN": is_interpreted() and query.dtype == torch.bfloat16,
        }

    def forward(self) -> tuple[Tensor, Tensor]:
        output = torch.empty_like(self.query)
        sums = self.query.new_empty(self.query.shape[:3], dtype=torch.float32)
        tiling = self._cut(self.tilings.forward)
        states = (self.query, self.key, self.value, output)
        self._launch(
            self.kernels.forward_kernel, self._tiles(tiling), tiling, *states, sums, *self._lists(),
            *_strides(*states), *self._numbers(self.tables.query_blocks), MASKED=tiling.masked,
        )  # fmt: skip
        return output, sums

    def backward(self, gradient: Tensor, output: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = _dense_features(gradient)
        delta = torch.empty_like(sums)
        queries = self.query.shape[2]
        rows = 32
        grid = (-(-queries // rows), self.query.shape[1])
        self._at_device(
            self.kernels.delta_kernel, grid, output, gradient, delta, *_strides(output, gradient), queries,
            WIDTH=self.width, PADDED=self.shape["PADDED"], ROWS=rows,
        )  # fmt: skip
        d_query = torch.empty_like(self.query)
        tiling = self._cut(self.tilings.query_gradient)
        states = (self.query, self.key, self.value, gradient, d_query)
        self._launch(
            self.kernels.query_gradient_kernel, self._tiles(tiling), tiling, *states, sums, delta, *self._lists(),
            *_strides(*states), *self._numbers(self.tables.query_blocks), MASKED=tiling.masked,
        )  # fmt: skip
        d_key, d_value = (torch.empty(self.key.shape, dtype=s.dtype, device=s.device) for s in (self.key, self.value))
        tiling = self._cut(self.tilings.key_gradient)
        states = (self.query, self.key, self.value, gradient)
        whole, masked = self.tables.by_key
        self._launch(
            self.kernels.key_gradient_kernel, -(-self.keys // tiling.columns), tiling, *states, d_key, d_value, sums,
            delta, whole.starts, whole.blocks, masked.starts, masked.blocks, self.tables.begin, self.tables.reach,
            *_strides(*states), *self._numbers(self.tables.key_blocks),
        )  # fmt: skip
        return d_query, d_key, d_value

    def _lists(self) -> tuple[Tensor, ...]:
        whole, masked = self.tables.whole, self.tables.masked
        return whole.starts, whole.blocks, masked.starts, masked.blocks, self.tables.begin, self.tables.reach

    def _numbers(self, rows: int) -> tuple[int, int, int, int, float]:
        """Queries, keys, missing queries of the first block, rows of lists from head to head, scale."""
        return self.query.shape[2], self.keys, self.before, rows if self.tables.heads > 1 else 0, self.scale

    def _tiles(self, tiling: Tiling) -> int:
        return self.tables.query_blocks * -(-self.plan.query_block * self.group // tiling.rows)

    def _cut(self, tiling: Tiling) -> Tiling:
        """Tiles no larger than the plan's blocks, and dividing them."""
        rows = max(16, 1 << (self.plan.query_block * self.group - 1).bit_length())
        columns = self.plan.key_block & -self.plan.key_block  # the largest power of two that divides it
        return Tiling(
            min(tiling.rows, rows), min(tiling.columns, columns), min(tiling.masked, columns), tiling.warps,
            tiling.stages,
        )  # fmt: skip

    def _launch(self, kernel: Any, tiles: int, tiling: Tiling, *arguments: Any, **constants: Any) -> None:
        """`tiles` programs for each key head."""
        self._at_device(
            kernel, (tiles, self.key_heads), *arguments, **self.shape, **constants, ROWS=tiling.rows,
            COLUMNS=tiling.columns, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip

    def _at_device(self, kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
        run: Callable[..., Any] = kernel[grid]
        if self.query.is_cuda:
            with torch.cuda.device(self.query.device):  # Triton launches on the current device
                run(*arguments, **constants)
        else:
            run(*arguments, **constants)


def _dense_features(states: Tensor) -> Tensor:
    """The same states with the features of a token side by side; other axes may stand in any order."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _strides(*states: Tensor) -> list[int]:
    """From head to head and from token to token, of each."""
    return [stride for one in states for stride in one.stride()[1:3]]
