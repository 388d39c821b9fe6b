"""Block plans on torch's FlexAttention: the compiled backend, fast on CUDA, and on a CPU where its compiling pays.

The block lists go in as they are (`BlockMask.from_kv_blocks`); no mask is evaluated over all pairs. Every length is
filled up to a multiple of `BUCKET` tokens and compiled for that size alone: on CPUs compiling for any size fails with
captured tensors in torch 2.13 (reference page).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.plan import BlockPlan
from unclipped.core.errors import UsageError

SMALLEST_BLOCK = 128
"""Keys that a block must hold a multiple of."""
SMALLEST_HEAD = 16
"""Least width of a head on CUDA (torch 2.13)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUCKET = 1024
"""Tokens that lengths are rounded up to, so that few sizes are compiled."""


@cache
def compiled() -> Callable[..., Any]:
    """FlexAttention, compiled at its first call for each size: 10 s and more on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention_by_plan(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, *, scale: float) -> Tensor:
    """query (1, H, M, d), key and value (1, Hkv, N, d) → (1, H, M, d).

    Raises UsageError for other types than float32, bfloat16 and float16, for blocks smaller than the kernel's own tiles
    (it would read past them without a word), for heads below 16 on CUDA, and for gradients on a CPU, which the compiled
    kernel does not have.
    """
    needs_gradient = is_differentiated(query, key, value)
    reason = reason_against_flex(query, key, value, key_block=plan.key_block)
    if reason is not None:
        raise UsageError(reason)
    before = plan.offset - plan.first_block * plan.query_block  # tokens of the first query block without a query
    step = max(BUCKET, plan.query_block)
    queries, keys = (-(-length // step) * step for length in (before + query.shape[2], plan.length))
    own = F.pad(query, (0, 0, before, queries - before - query.shape[2]))  # (1, H, queries, d)
    filled = [F.pad(states, (0, 0, 0, keys - plan.length)) for states in (key, value)]  # (1, Hkv, keys, d)
    mask = block_mask(plan, query.shape[1] // key.shape[1], (queries, keys), before, needs_gradient)
    output = compiled()(own.contiguous(), *filled, block_mask=mask, scale=scale, enable_gqa=True)
    return output[:, :, before : before + query.shape[2]]


def is_differentiated(*states: Tensor) -> bool:
    """Whether a gradient of any of the states is asked for."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in states)


def reason_against_flex(query: Tensor, key: Tensor, value: Tensor, *, key_block: int) -> str | None:
    """What the kernel cannot take of types, widths (…, d), key blocks in tokens and gradients, with the remedy, or
    None."""
    device = query.device.type
    fitting = "gather" if device == "cpu" else "reference"
    if key_block % SMALLEST_BLOCK:
        return (
            f"backend flex takes key blocks of a multiple of {SMALLEST_BLOCK} tokens, found {key_block}; "
            f"use backend='{fitting}', or other blocks"
        )
    if device == "cpu" and is_differentiated(query, key, value):
        return "backend flex computes no gradients on a CPU; train with backend='gather'"
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        found = ", ".join(str(states.dtype).removeprefix("torch.") for states in (query, key, value))
        return (
            f"backend flex takes float32, bfloat16 or float16, the same for all, found {found}; "
            f"use backend='{fitting}' for others"
        )
    if device == "cuda" and query.shape[-1] < SMALLEST_HEAD:
        return (
            f"backend flex takes heads of at least {SMALLEST_HEAD} on CUDA, found {query.shape[-1]}; "
            "use backend='reference'"
        )
    return None


def block_mask(plan: BlockPlan, group: int, shape: tuple[int, int], before: int, needs_gradient: bool) -> Any:
    """The plan as a BlockMask for queries and keys filled up to `shape`; `before`: fillers before the first query."""
    from torch.nn.attention.flex_attention import BlockMask

    device = plan.lists.device
    key_blocks = shape[1] // plan.key_block
    rows, heads = shape[0] // plan.query_block, plan.lists.shape[0]

    def places(lists: Tensor) -> Tensor:
        """Lists as bool (heads, rows, key blocks)."""
        chosen = torch.zeros(heads, rows, key_blocks + 1, dtype=torch.bool, device=device)
        chosen[:, : plan.blocks].scatter_(2, lists % (key_blocks + 1), value=True)  # -1: the last, unused column
        return chosen[:, :, :key_blocks]

    numbers = torch.arange(rows, device=device)[:, None] + plan.first_block
    span = torch.arange(key_blocks, device=device)[None, :] // (plan.query_block // plan.key_block)
    diagonal = F.pad(plan.is_diagonal, (0, rows - plan.blocks))[:, None] & (numbers == span)  # (rows, key blocks)
    used = torch.arange(key_blocks, device=device) * plan.key_block < plan.length
    masked, whole = places(plan.partial) | (diagonal & used), places(plan.lists)
    arguments: list[Tensor] = []
    for chosen in (masked, whole):
        if heads > 1:
            chosen = chosen.repeat_interleave(group, dim=0)
        order = chosen.int().argsort(dim=-1, descending=True, stable=True).int()  # chosen blocks first, ascending
        arguments += [chosen.sum(dim=-1).int()[None], order[None]]
    begin, reach = (
        F.pad(bound, (before, shape[0] - before - len(bound))) for bound in (plan.begin, plan.reach)
    )  # (queries,)
    is_causal = plan.offset == 0 and bool(plan.is_diagonal.all())
    is_cut = bool(plan.begin.any())

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def reached(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= reach[query]

    def between(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= reach[query]) & (key >= begin[query])

    return BlockMask.from_kv_blocks(
        *arguments,
        BLOCK_SIZE=(plan.query_block, plan.key_block),
        mask_mod=causal if is_causal else between if is_cut else reached,
        seq_lengths=shape,
        compute_q_blocks=needs_gradient,
    )
