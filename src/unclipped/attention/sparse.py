"""Attention under a block plan: `gather` runs it fast on CPUs, `reference` runs it by the definition.

Both take query (1, H, N, d), key and value (1, Hkv, N, d) and return (1, H, N, d). Query heads of a group share their
key blocks. `gather` makes two calls of torch's flash kernel a group of equal lists, neither with a mask: the span of a
query block against itself, causally, and against its gathered earlier key blocks, in full. The two are joined by their
log-sum-exp. torch's kernel does not differentiate its log-sum-exp (gradients through the join would be wrong without a
word), so the backward is written out: each part's backward takes the joined output and the joined log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.plan import BlockPlan
from unclipped.core.errors import UsageError

_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
BACKENDS = ("gather", "reference")
_GATHERED_BYTES = 1 << 25  # keys and values gathered at a time: about a CPU's last-level cache


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, *, scale: float, backend: str | None = None
) -> Tensor:
    """Attention under `plan`; backend: `gather` on a CPU, `reference` (quadratic) elsewhere, unless named.

    Raises UsageError when shapes do not fit the plan or each other, or for `gather` off the CPU.
    """
    _check(query, key, value, plan)
    chosen = backend or ("gather" if query.device.type == "cpu" else "reference")
    if chosen not in BACKENDS:
        raise UsageError(f"backend: expected one of {', '.join(BACKENDS)}, found '{chosen}'")
    if chosen == "reference":
        return reference_attention(query, key, value, plan, scale=scale)
    if query.device.type != "cpu":
        raise UsageError(f"backend gather runs on CPUs, the queries are on {query.device}; use backend='reference'")
    return _Gather.apply(query, key, value, plan, scale)  # type: ignore[return-value]


def _check(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.shape != value.shape or query.shape[0] != 1 or query.shape[1] % key.shape[1]:
        raise UsageError(
            f"sparse attention: expected (1, H, N, d) and twice (1, Hkv, N, d), H a multiple of Hkv: {shapes}"
        )
    if query.shape[2] != plan.length or key.shape[2] != plan.length:
        raise UsageError(f"sparse attention: the plan is for {plan.length} tokens, found {shapes}")
    if plan.lists.shape[0] not in (1, key.shape[1]):
        raise UsageError(f"sparse attention: the plan has lists for {plan.lists.shape[0]} heads, found {shapes}")


def reference_attention(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, *, scale: float) -> Tensor:
    """By the definition, with the plan's mask written out; quadratic in memory, in any floating type."""
    group = query.shape[1] // key.shape[1]
    mask = plan.element_mask().to(query.device)  # (heads, N, N)
    if mask.shape[0] > 1:
        mask = mask.repeat_interleave(group, dim=0)
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=scale)


class _Gather(torch.autograd.Function):
    """The gather backend with its own backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float) -> Tensor:
        output, sums = _gather_forward(query[0], key[0], value[0], plan, scale)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.plan, ctx.scale = plan, scale
        return output[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        states = (query[0], key[0], value[0])
        grads = _gather_backward(gradients[0][0].contiguous(), *states, output, sums, ctx.plan, ctx.scale)
        return (*(grad[None] for grad in grads), None, None)


def _spans(plan: BlockPlan) -> tuple[int, int]:
    """Query blocks of full length, and tokens of the shorter one behind them."""
    return divmod(plan.length, plan.query_block)


def _diagonal(states: Tensor, full: int, size: int) -> Tensor:
    """(heads, N, d) → its full blocks, (full, heads, size, d), a view."""
    return states[:, : full * size].unflatten(1, (full, size)).transpose(0, 1)


def _groups(plan: BlockPlan, head: int, bytes_of_block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Query blocks of one key head with lists of equal length: (m,) and their key blocks (m, count), in portions."""
    row = head if plan.lists.shape[0] > 1 else 0
    counts, lists = plan.counts[row], plan.lists[row]
    for count in counts.unique().tolist():
        if count == 0:
            continue
        members = (counts == count).nonzero()[:, 0]
        portion = max(1, _GATHERED_BYTES // (count * bytes_of_block))
        for part in members.split(portion):
            yield part, lists[part, :count]


class _View:
    """One portion of query blocks of one head group as batches for the flash kernel.

    The last block may be shorter than the others, so it is taken alone.
    """

    def __init__(self, plan: BlockPlan, members: Tensor) -> None:
        self.size = plan.query_block
        full, rest = _spans(plan)
        places = members.tolist()
        self.pieces: list[tuple[Tensor, int]] = []  # (which of the members, tokens of each)
        short = rest > 0 and places[-1] == full
        whole = len(places) - short
        if whole:
            self.pieces.append((torch.arange(whole), self.size))
        if short:
            self.pieces.append((torch.arange(whole, len(places)), rest))


def _rows(members: Tensor, size: int, tokens: int) -> slice | Tensor:
    """Token positions of query blocks; a slice (no copy) when the blocks follow each other."""
    first = int(members[0]) * size
    if len(members) == 1 or bool((members.diff() == 1).all()):
        return slice(first, first + (len(members) - 1) * size + tokens)
    return (members[:, None] * size + torch.arange(tokens)).flatten()


def _batched(states: Tensor, members: Tensor, size: int, tokens: int) -> Tensor:
    """(G, N, d) → (m, G, tokens, d) of the query blocks `members`."""
    return states[:, _rows(members, size, tokens)].unflatten(1, (len(members), tokens)).transpose(0, 1)


def _unbatched(states: Tensor) -> Tensor:
    """(m, G, tokens, d) → (G, m·tokens, d)."""
    return states.transpose(0, 1).flatten(1, 2)


def _key_blocks(states: Tensor, lists: Tensor, size: int) -> Tensor:
    """(N, d) and (m, count) → the tokens of those blocks, (m, count·size, d). The ragged last is never listed."""
    whole = states.shape[0] // size
    return states[: whole * size].unflatten(0, (whole, size))[lists].flatten(1, 2)


def _gather_forward(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """query (H, N, d), key and value (Hkv, N, d) → output (H, N, d), log-sum-exp (H, N) in the kernel's precision."""
    heads, length, width = query.shape
    group, size = heads // key.shape[0], plan.query_block
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = query.new_empty(heads, length, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    full, rest = _spans(plan)
    bytes_of_block = 2 * plan.key_block * width * query.element_size()
    for head in range(key.shape[0]):
        span = slice(head * group, (head + 1) * group)
        own, k, v = query[span], key[head], value[head]  # (G, N, d), (N, d), (N, d)
        out, lse = output[span], sums[span]  # views that are filled in place
        spread = [states.expand(group, -1, -1) for states in (k, v)]  # (G, N, d), no copy
        if full:
            part, part_lse = _flash(
                _diagonal(own, full, size), *(_diagonal(s, full, size) for s in spread), 0.0, True, scale=scale
            )  # (full, G, size, d), (full, G, size)
            out[:, : full * size] = _unbatched(part)
            lse[:, : full * size] = part_lse.transpose(0, 1).flatten(1)
        if rest:
            tail = slice(full * size, length)
            part, part_lse = _flash(own[None, :, tail], *(s[None, :, tail] for s in spread), 0.0, True, scale=scale)
            out[:, tail], lse[:, tail] = part[0], part_lse[0]
        for members, lists in _groups(plan, head, bytes_of_block):
            for which, tokens in _View(plan, members).pieces:
                blocks = members[which]
                queries = _batched(own, blocks, size, tokens)  # (m, G, tokens, d)
                keys, values = (
                    _key_blocks(s, lists[which], plan.key_block)[:, None].expand(-1, group, -1, -1) for s in (k, v)
                )  # (m, G, count·key_block, d)
                part, part_lse = _flash(queries, keys, values, 0.0, False, scale=scale)
                rows = _rows(blocks, size, tokens)
                earlier = part_lse.transpose(0, 1).flatten(1)  # (G, m·tokens)
                weight = torch.sigmoid(earlier - lse[:, rows])[..., None].to(out.dtype)  # share of the earlier keys
                out[:, rows] = torch.lerp(out[:, rows], _unbatched(part), weight)
                lse[:, rows] = torch.logaddexp(lse[:, rows], earlier)
    return output, sums


def _gather_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output (H, N, d)."""
    heads = query.shape[0]
    group, size = heads // key.shape[0], plan.query_block
    full, rest = _spans(plan)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    grads = [torch.zeros(states.shape, dtype=exact) for states in (query, key, value)]
    bytes_of_block = 2 * plan.key_block * query.shape[2] * query.element_size()
    for head in range(key.shape[0]):
        span = slice(head * group, (head + 1) * group)
        own, k, v, out, lse, grad = query[span], key[head], value[head], output[span], sums[span], gradient[span]
        d_query, d_key, d_value = grads[0][span], grads[1][head], grads[2][head]
        pieces = [(torch.arange(full), size)] if full else []
        pieces += [(torch.tensor([full]), rest)] if rest else []
        for blocks, tokens in pieces:  # the causal span of each block
            arguments = [_batched(s, blocks, size, tokens) for s in (grad, own, k.expand(group, -1, -1))]
            arguments += [_batched(s, blocks, size, tokens) for s in (v.expand(group, -1, -1), out)]
            parts = _part_backward(arguments, lse, blocks, size, tokens, scale, is_causal=True)
            rows = _rows(blocks, size, tokens)
            d_query[:, rows] += _unbatched(parts[0])
            d_key[rows] += _unbatched(parts[1]).sum(dim=0)
            d_value[rows] += _unbatched(parts[2]).sum(dim=0)
        for members, lists in _groups(plan, head, bytes_of_block):
            for which, tokens in _View(plan, members).pieces:
                blocks, listed = members[which], lists[which]
                keys, values = (
                    _key_blocks(s, listed, plan.key_block)[:, None].expand(-1, group, -1, -1) for s in (k, v)
                )
                arguments = [_batched(s, blocks, size, tokens) for s in (grad, own)]
                arguments += [keys, values, _batched(out, blocks, size, tokens)]
                parts = _part_backward(arguments, lse, blocks, size, tokens, scale, is_causal=False)
                d_query[:, _rows(blocks, size, tokens)] += _unbatched(parts[0])
                places = (listed[..., None] * plan.key_block + torch.arange(plan.key_block)).flatten()
                for total, part in ((d_key, parts[1]), (d_value, parts[2])):
                    total.index_add_(0, places, part.sum(dim=1).flatten(0, 1).to(exact))
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _part_backward(
    arguments: list[Tensor], lse: Tensor, blocks: Tensor, size: int, tokens: int, scale: float, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's backward of one part, with the joined output and log-sum-exp: (m, G, …, d) thrice."""
    grad, query, key, value, out = arguments
    joined = _batched(lse[..., None], blocks, size, tokens)[..., 0].contiguous()  # (m, G, tokens)
    return _flash_backward(grad, query, key, value, out, joined, 0.0, is_causal, scale=scale)
