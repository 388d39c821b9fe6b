"""Attention under a block plan: `gather` runs it fast on CPUs, `triton` and `flex` on CUDA, `reference` by its words.

All take query (1, H, M, d), key and value (1, Hkv, N, d) and return (1, H, M, d); the queries are the last M of the N
tokens. Query heads of a group share their key blocks. `gather` makes up to three calls of torch's flash kernel for the
query blocks of equal lists: the span of a query block against itself, causally; its gathered key blocks, in full; and
those behind a mask (later tokens, the border of a sliding window, chunks that begin inside a block), of which plain
causal rows have none. The parts
are joined by their log-sum-exp. torch's kernel does not differentiate its log-sum-exp (gradients through the join would
be wrong without a word), so the backward is written out: each part's backward takes the joined output and the joined
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.flex import flex_attention_by_plan, reason_against_flex
from unclipped.attention.plan import BlockPlan
from unclipped.attention.triton_backend import reason_against_triton, triton_attention
from unclipped.core.errors import UsageError

_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
BACKENDS = ("gather", "triton", "flex", "reference")
_WORK_BYTES = 1 << 23  # gathered keys and values and results of one call of the kernel; from 4 MiB on as fast


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, *, scale: float, backend: str | None = None
) -> Tensor:
    """Attention under `plan`; backend: that of `default_backend` unless named.

    Raises UsageError when shapes do not fit the plan or each other, or for `gather` off the CPU.
    """
    _check(query, key, value, plan)
    chosen = backend or default_backend(query.device.type)
    if chosen not in BACKENDS:
        raise UsageError(f"backend: expected one of {', '.join(BACKENDS)}, found '{chosen}'")
    if chosen == "triton":
        return triton_attention(query, key, value, plan, scale=scale)
    if chosen == "flex":
        return flex_attention_by_plan(query, key, value, plan, scale=scale)
    if chosen == "reference":
        return reference_attention(query, key, value, plan, scale=scale)
    if query.device.type != "cpu":
        raise UsageError(f"backend gather runs on CPUs, the queries are on {query.device}; use backend='reference'")
    return _Gather.apply(query, key, value, plan, scale)  # type: ignore[return-value]


def default_backend(device_type: str) -> str:
    """`gather` on a CPU, `flex` on CUDA where Triton is there to compile it, else `reference`, which is quadratic.

    `triton` is asked for by name, until its kernels have run on a GPU.
    """
    if device_type == "cpu":
        return "gather"
    return "flex" if device_type == "cuda" and find_spec("triton") is not None else "reference"


def reason_against(
    backend: str, query: Tensor, key: Tensor, value: Tensor, *, key_block: int, scale: float
) -> str | None:
    """What `backend` cannot take of states that a model hands over, query (B, H, M, d), key and value (B, Hkv, N, d),
    and of key blocks in tokens, with the remedy, or None. Asked before planning.

    A backend that cannot run on this machine at all is no matter of the states: `sparse_attention` raises for it.
    """
    if key.shape != value.shape:
        return (
            f"block plans take values of the shape of the keys, found keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)}; run this model with its own attention"
        )
    if backend == "triton":
        return reason_against_triton(query, key, value, key_block=key_block, scale=scale)
    return reason_against_flex(query, key, value, key_block=key_block) if backend == "flex" else None


def _check(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.shape != value.shape or query.shape[0] != 1 or query.shape[1] % key.shape[1]:
        raise UsageError(
            f"sparse attention: expected (1, H, M, d) and twice (1, Hkv, N, d), H a multiple of Hkv: {shapes}"
        )
    if query.shape[2] != plan.length - plan.offset or key.shape[2] != plan.length:
        behind = f" and the queries from {plan.offset} on" if plan.offset else ""
        raise UsageError(f"sparse attention: the plan is for {plan.length} tokens{behind}, found {shapes}")
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


@dataclass(frozen=True)
class _Part:
    """Query blocks of equal size of one key head, and the keys that they attend to in one call of the kernel."""

    rows: slice | Tensor
    """Their queries, in order; a slice (no copy) where the blocks follow each other."""
    tokens: int
    """Queries of each block."""
    lists: Tensor | None
    """Key blocks (m, count), or None for the blocks' own causal span."""
    mask: Tensor | None = None
    """Added to the scores, (m, 1, tokens, count·key_block)."""
    shift: int = 0
    """Blocks by which lists of consecutive key blocks move on from one query block to the next (windows); 0: no such
    lists. Their keys are read in place."""


def _heads(plan: BlockPlan, key_heads: int) -> list[tuple[int, range]]:
    """Rows of the plan's lists, each with key heads that run its parts. Heads that share their lists run them together,
    except where keys are filled up: copies of all heads at once would be as large as the states."""
    heads = [range(head, head + 1) for head in range(key_heads)]
    if plan.lists.shape[0] > 1:
        return list(enumerate(heads))
    return [(0, own) for own in heads] if _lacking(plan) else [(0, range(key_heads))]


def _lacking(plan: BlockPlan) -> int:
    """Tokens by which keys are filled up to whole blocks: only blocks behind a mask may be shorter than others."""
    return -plan.length % plan.key_block if bool(plan.partial_counts.any()) else 0


def _parts(plan: BlockPlan, row: int, group: int, width: int, dtype: torch.dtype) -> Iterator[_Part]:
    """The calls that make up the attention under lists `row`: diagonals, whole blocks, then blocks behind the mask.

    Each works on so many query blocks that its memory is bounded, whatever the length.
    """
    bytes_of_block = 2 * plan.key_block * width * dtype.itemsize
    bytes_of_row = 2 * group * plan.query_block * width * dtype.itemsize  # the result, and it joined
    for part in plan.is_diagonal.nonzero()[:, 0].split(max(1, _WORK_BYTES // bytes_of_row)):
        for members, tokens in _by_size(plan, part):
            yield _Part(_rows(plan, members, tokens), tokens, None)
    for members, lists in _groups(plan.counts[row], plan.lists[row], bytes_of_block, bytes_of_row):
        for chosen, tokens in _by_size(plan, members):
            listed = lists[torch.isin(members, chosen)]
            yield _Part(_rows(plan, chosen, tokens), tokens, listed, shift=_shift(listed))
    for members, lists in _groups(plan.partial_counts[row], plan.partial[row], 2 * bytes_of_block, bytes_of_row):
        for chosen, tokens in _by_size(plan, members):
            rows, listed = _rows(plan, chosen, tokens), lists[torch.isin(members, chosen)]
            keys = (listed[..., None] * plan.key_block + torch.arange(plan.key_block)).flatten(1)  # (m, keys)
            begin, reach = (
                bound[rows].unflatten(0, (len(chosen), tokens))[..., None] for bound in (plan.begin, plan.reach)
            )  # (m, tokens, 1)
            hidden = (keys[:, None, :] > reach) | (keys[:, None, :] < begin)  # (m, tokens, keys)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            yield _Part(rows, tokens, listed, mask[:, None])


def _groups(counts: Tensor, lists: Tensor, bytes_of_block: int, bytes_of_row: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Query blocks of one key head with lists of equal length: (m,) and their key blocks (m, count), in portions."""
    for count in counts.unique().tolist():
        if count == 0:
            continue
        members = (counts == count).nonzero()[:, 0]
        portion = max(1, _WORK_BYTES // (count * bytes_of_block + bytes_of_row))
        for part in members.split(portion):
            yield part, lists[part, :count]


def _shift(lists: Tensor) -> int:
    """`_Part.shift` of lists (m, count)."""
    if bool((lists.diff(dim=1) != 1).any()):
        return 0
    steps = lists[:, 0].diff()
    if not len(steps):
        return 1
    step = int(steps[0])  # negative where later tokens are seen: no stride can be
    return step if step > 0 and bool((steps == step).all()) else 0


def _by_size(plan: BlockPlan, members: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Query blocks parted by their number of queries: the first and the last may have fewer than the others."""
    sizes = torch.from_numpy(plan.sizes)[members]
    for size in sizes.unique().tolist():
        yield members[sizes == size], size


def _rows(plan: BlockPlan, members: Tensor, tokens: int) -> slice | Tensor:
    """Places of the queries of query blocks of `tokens` each."""
    starts = ((members + plan.first_block) * plan.query_block - plan.offset).clamp(min=0)
    first = int(starts[0])
    if len(members) == 1 or (tokens == plan.query_block and bool((members.diff() == 1).all())):
        return slice(first, first + len(members) * tokens)
    return (starts[:, None] + torch.arange(tokens)).flatten()


def _batched(states: Tensor, part: _Part) -> Tensor:
    """(G, M, …) → (m, G, tokens, …) of the queries of a part; a view where they follow each other."""
    return states[:, part.rows].unflatten(1, (-1, part.tokens)).transpose(0, 1)


def _unbatched(states: Tensor) -> Tensor:
    """(m, G, tokens, …) → (G, m·tokens, …)."""
    return states.transpose(0, 1).flatten(1, 2)


def _put(states: Tensor, part: _Part, values: Tensor) -> None:
    """Write values (m, G, tokens, …) to the queries of a part in `states` (G, M, …)."""
    if isinstance(part.rows, slice):
        _batched(states, part).copy_(values)
    else:
        states[:, part.rows] = _unbatched(values)


class _Keys:
    """Keys and values of one head as the parts read them: (N, d) each, filled up to whole blocks where one needs it."""

    def __init__(self, key: Tensor, value: Tensor, plan: BlockPlan, group: int) -> None:
        self.plan, self.group = plan, group
        self.states = [key, value]
        lacking = _lacking(plan)
        if lacking:
            self.states = [F.pad(states, (0, 0, 0, lacking)) for states in self.states]
        self.whole = self.states[0].shape[0] // plan.key_block

    def of(self, part: _Part) -> list[Tensor]:
        """Keys and values of a part, (m, G, keys, d) each."""
        if part.lists is None:
            spread = [states.expand(self.group, -1, -1) for states in self.states]  # (G, N, d), no copy
            return [_batched(states[:, self.plan.offset :], part) for states in spread]
        size, (_, count) = self.plan.key_block, part.lists.shape
        if part.shift and all(states.is_contiguous() for states in self.states):
            first, width = int(part.lists[0, 0]) * size, self.states[0].shape[1]
            shape, strides = (len(part.lists), count * size, width), (part.shift * size * width, width, 1)
            found = [states[first:].as_strided(shape, strides) for states in self.states]
        else:
            blocks = [states[: self.whole * size].unflatten(0, (self.whole, size)) for states in self.states]
            found = [states[part.lists].flatten(1, 2) for states in blocks]
        return [states[:, None].expand(-1, self.group, -1, -1) for states in found]

    def places(self, part: _Part) -> Tensor | slice:
        """Tokens of the keys of a part, flat; those that fill up stand behind the last."""
        if part.lists is None:
            offset, rows = self.plan.offset, part.rows
            return slice(rows.start + offset, rows.stop + offset) if isinstance(rows, slice) else rows + offset
        return (part.lists[..., None] * self.plan.key_block + torch.arange(self.plan.key_block)).flatten()


def _gather_forward(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """query (H, M, d), key and value (Hkv, N, d) → output (H, M, d), log-sum-exp (H, M) in the kernel's precision."""
    heads, length, width = query.shape
    group = heads // key.shape[0]
    output = torch.empty_like(query, memory_format=torch.contiguous_format).unflatten(0, (-1, group))  # (Hkv, G, M, d)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums = query.new_empty(key.shape[0], group, length, dtype=exact)
    query = query.unflatten(0, (-1, group))  # (Hkv, G, M, d)
    for row, shared in _heads(plan, key.shape[0]):
        keys = [_Keys(key[head], value[head], plan, group) for head in shared]
        is_new = torch.ones(length, dtype=torch.bool)  # queries without any part so far
        for part in _parts(plan, row, group, width, query.dtype):
            is_first = bool(is_new[part.rows].all())
            if not is_first and bool(is_new[part.rows].any()):  # some have a part: start the others from nothing
                fresh = is_new.nonzero()[:, 0]
                output[shared.start : shared.stop, :, fresh] = 0.0
                sums[shared.start : shared.stop, :, fresh] = float("-inf")
                is_new[:] = False
            is_new[part.rows] = False
            for head, own in zip(shared, keys, strict=True):
                states = _batched(query[head], part)
                result, part_sums = _flash(
                    states, *own.of(part), 0.0, part.lists is None, attn_mask=part.mask, scale=scale
                )  # (m, G, tokens, d), (m, G, tokens)
                if not is_first:
                    before, earlier = _batched(sums[head], part), _batched(output[head], part)
                    weight = torch.sigmoid(part_sums - before)[..., None].to(result.dtype)  # share of this part
                    result = torch.lerp(earlier, result, weight)
                    part_sums = torch.logaddexp(before, part_sums)
                _put(output[head], part, result)
                _put(sums[head], part, part_sums)
    return output.flatten(0, 1), sums.flatten(0, 1)


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
    """Gradients of query, key and value from that of the output (H, M, d)."""
    heads, _, width = query.shape
    group, tokens = heads // key.shape[0], key.shape[1]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    filled = -(-tokens // plan.key_block) * plan.key_block  # gradients of keys that only fill up are dropped
    d_queries = torch.zeros(query.shape, dtype=exact)
    d_keys, d_values = (torch.zeros(key.shape[0], filled, width, dtype=exact) for _ in range(2))
    for row, shared in _heads(plan, key.shape[0]):
        keys = {head: _Keys(key[head], value[head], plan, group) for head in shared}
        for part in _parts(plan, row, group, width, query.dtype):
            for head, own in keys.items():
                span = slice(head * group, (head + 1) * group)
                grad, states, out = (_batched(whole[span], part) for whole in (gradient, query, output))
                joined = _batched(sums[span], part).contiguous()  # (m, G, tokens)
                results = _flash_backward(
                    grad, states, *own.of(part), out, joined, 0.0, part.lists is None, attn_mask=part.mask, scale=scale
                )
                d_queries[span][:, part.rows] += _unbatched(results[0])
                places = own.places(part)
                for total, result in ((d_keys[head], results[1]), (d_values[head], results[2])):
                    summed = result.sum(dim=1).flatten(0, 1).to(exact)  # (m·keys, d)
                    if isinstance(places, slice):
                        total[places] += summed
                    else:
                        total.index_add_(0, places, summed)
    return d_queries.to(query.dtype), d_keys[:, :tokens].to(key.dtype), d_values[:, :tokens].to(value.dtype)
