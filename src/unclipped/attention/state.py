"""What a model under sparse prefill knows: its pattern, the layouts of the current call, and what each layer did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.calibration import FIXED, LENGTHS, Calibration, Shape, calibration_for
from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Pattern
from unclipped.attention.plan import BlockPlan, build_plan
from unclipped.attention.rows import OwnMask, Row, rows_under
from unclipped.attention.sparse import default_backend, reason_against, sparse_attention
from unclipped.core.errors import UsageError

Fallback = Literal["auto", "never"]
logger = logging.getLogger("unclipped.attention")
_CONTINUES = "the forward continues a cache with few tokens: decode and verification are dense"
_MOST_PLANS = 64
OWN_MASK = "the layer has a mask of its own that is no sliding window (chunked attention, packed documents)"

# By the identity of a configuration. A state lives in its model's hold, so it goes with the model, and another
# configuration that later gets the same identity finds nothing.
_STATES: WeakValueDictionary[int, SparseState] = WeakValueDictionary()


@dataclass(frozen=True)
class Prompt:
    """The rows of the prompt that a forward belongs to, each without padding."""

    layouts: tuple[Layout, ...]
    kind: Literal["forward", "so far", "chunks", "generation"]
    """What the layouts describe: the tokens of this forward, which is no part of a larger prompt; those that the cache
    and this forward hold, of a prompt that may go on; the whole of a prompt that may come in chunks; the whole prompt
    of a generation, in which any further tokens are decoded ones."""


@dataclass(frozen=True)
class PrefillRows:
    """The rows of one forward, or why it runs dense whatever the pattern."""

    rows: tuple[Row, ...] = ()
    reason: str | None = None
    refusable: bool = False
    """Whether `fallback="never"` makes the reason an error; decode steps are no error."""
    offset: int = 0
    """Tokens of the batch, padding included, that the cache held before this forward."""
    dropped: int = 0
    """Tokens of the batch, padding included, that stand before the first key: caches of layers with a sliding window
    keep no more keys than the window reaches back to."""


@dataclass(frozen=True)
class LayerRecord:
    """What a layer did at its last prefill."""

    layer: int
    tokens: int
    """Tokens of the longest row."""
    mode: Literal["sparse", "dense"]
    reason: str | None
    """Why it ran dense."""
    density: float
    """Attended pairs over those of dense causal attention, mean over rows."""
    plan_seconds: float = field(default=0.0, compare=False)
    """Time of this layer's plans, all rows: for a static pattern their building, in the layer that first needs them;
    for a dynamic one also pooling, scoring and choosing. On a GPU with the wait for what was asked of it before."""


class SparseState:
    """Pattern, fallback rule and records of one attached model."""

    def __init__(
        self,
        pattern: Pattern,
        fallback: Fallback,
        *,
        key_block: int,
        query_block: int,
        backend: str | None,
        calibration: Calibration | None = None,
    ) -> None:
        """Blocks in tokens, as `build_plan` takes them. calibration: when `auto` runs dense; None: measured where a
        CPU prefills, the fixed rule elsewhere."""
        self.pattern, self.fallback, self.backend, self.calibration = pattern, fallback, backend, calibration
        self.key_block, self.query_block = key_block, query_block
        self.records: dict[int, LayerRecord] = {}
        self.is_paused = False
        # Of this thread's forward: its rows, or why there are none.
        self._prompt: ContextVar[Prompt | str] = ContextVar("prompt", default="the model was not called")
        self.clock: Callable[[], float] = time.perf_counter
        """What plans are timed by; benchmarks on busy machines take the process's own time."""
        self._plan_seconds = 0.0  # since the layer began
        self._plans: dict[tuple[Layout, Pattern, int, int], BlockPlan] = {}
        self._told: set[str] = set()

    def set_prompt(self, prompt: Prompt | str) -> None:
        """The prompt that the forward that begins belongs to, or the reason why it is not known."""
        self._prompt.set(prompt)

    def rows_of(
        self,
        batch_size: int,
        q_length: int,
        q_offset: int,
        padding: Tensor | None,
        own_mask: OwnMask | None,
    ) -> PrefillRows:
        """Rows that may run sparsely, of `q_length` queries behind `q_offset` tokens of the cache.

        padding (B, tokens so far or more) bool, true where a token is. own_mask: None where the layer's mask is causal.

        Raises UsageError when a layout has another length than the row's tokens.
        """
        prompt = self._prompt.get()
        if isinstance(prompt, str):
            continues = q_offset > 0 and q_length < self.query_block
            return PrefillRows(reason=_CONTINUES if continues else prompt, refusable=not continues)
        if prompt.kind == "so far" and q_offset > 0 and q_length < self.query_block:
            return PrefillRows(reason=_CONTINUES)
        layouts, stop = prompt.layouts, q_offset + q_length
        if len(layouts) != batch_size:
            raise UsageError(f"sparse prefill: {len(layouts)} layouts for a batch of {batch_size}; give one a row")
        if padding is None:
            starts, ends = [0] * batch_size, [stop] * batch_size
        else:
            here = padding[:, :stop]  # (B, tokens so far); a static cache is longer
            changes = (here[:, 1:] != here[:, :-1]).sum(dim=1)  # (B,)
            if bool((changes > 1).any()):
                return PrefillRows(reason="the attention mask has gaps", refusable=True)
            starts = torch.where(here.any(dim=1), here.int().argmax(dim=1), stop).tolist()
            ends = here.sum(dim=1).tolist()
        rows = []
        for row, (layout, start, end) in enumerate(zip(layouts, starts, ends, strict=True)):
            is_exact = prompt.kind in ("forward", "so far")
            if (is_exact and end and layout.length != end) or (
                prompt.kind == "chunks" and not q_offset and layout.length < end
            ):
                raise wrong_length(row, layout.length, end)
            first = min(end, max(0, q_offset - start))
            rows.append(Row(start, layout, min(first, layout.length), min(end, layout.length), end))
        if all(row.first >= row.stop for row in rows):
            return PrefillRows(reason="decode steps are dense")
        found = rows if own_mask is None else rows_under(rows, own_mask)
        if found is None:
            return PrefillRows(reason=OWN_MASK, refusable=True)
        if any(
            row.layout.sight == "causal" and given.layout.sight != "causal"
            for row, given in zip(found, rows, strict=True)
        ) or (own_mask is None and any(row.layout.sight != "causal" for row in rows)):
            raise UsageError("sparse prefill: the layouts let images see later tokens, but the model's mask is causal")
        return PrefillRows(tuple(found), offset=q_offset, dropped=0 if own_mask is None else own_mask.dropped)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefill: PrefillRows,
        *,
        layer: int,
        scale: float,
        dropout: float,
        kind: str | None = None,
    ) -> Tensor | None:
        """Sparse output (B, H, Tq, d), zero at padding, or None when the layer is to run dense; records which.

        kind: the layer's type by the model's configuration, for messages.

        Raises UsageError with `fallback="never"` when the pattern cannot be run.
        """
        tokens = max((row.end for row in prefill.rows), default=query.shape[2])
        reason, refusable = prefill.reason, prefill.refusable
        if reason is None and dropout > 0:
            reason, refusable = f"attention dropout of {dropout:g}", True
        if reason is None:
            chosen = self.backend or default_backend(query.device.type)
            reason = reason_against(chosen, query, key, value, key_block=self.key_block, scale=scale)
            refusable = reason is not None
        self._plan_seconds = 0.0
        plans: list[BlockPlan | None] = []
        rule = FIXED
        if reason is None and self.fallback == "auto":
            longest = max(row.layout.length for row in prefill.rows)
            rule = self._rule(query, key, longest)
            reason = next((r for row in prefill.rows if (r := rule.reason_before(row.layout.length))), None)
            if self.backend is None and default_backend(query.device.type) == "reference":
                reason = f"no backend for {query.device.type} is faster than dense attention"
        if reason is None and prefill.dropped:  # keys that no query sees: so that positions stay those of the row
            key, value = (F.pad(states, (0, 0, prefill.dropped, 0)) for states in (key, value))
        if reason is None:
            states = zip(prefill.rows, query, key, strict=True)
            plans = [self._plan(layer, row, prefill.offset, q, k, scale) for row, q, k in states]
            if self.fallback == "auto":
                judged = zip(prefill.rows, plans, strict=True)
                reasons = (self._plan_reason(layer, row, plan, key.shape[1], rule) for row, plan in judged)
                reason = next((r for r in reasons if r), None)
        if reason is not None:
            if refusable:
                self.refuse(layer, kind, reason)
            self._record(LayerRecord(layer, tokens, "dense", reason, 1.0, self._plan_seconds))
            return None
        pieces = []
        for b, (row, plan) in enumerate(zip(prefill.rows, plans, strict=True)):
            shift = row.start - prefill.offset  # from a position of the row to one among the queries
            for first, stop, is_prefill in ((row.first, row.stop, True), (row.stop, row.end, False)):
                first = max(first, -shift)
                if first >= stop:
                    continue
                span = slice(first + shift, stop + shift)
                own = query[b : b + 1, :, span]
                keys, values = (s[b : b + 1, :, row.start : row.start + stop] for s in (key, value))
                if is_prefill and plan is not None:
                    piece = sparse_attention(own, keys, values, plan, scale=scale, backend=self.backend)
                else:
                    piece = dense_tail(own, keys, values, scale, row.layout.window)
                pieces.append((b, span, piece))
        if len(pieces) == 1 and pieces[0][1] == slice(0, query.shape[2]) and len(query) == 1:
            output = pieces[0][2]
        else:
            output = torch.zeros_like(query)  # (B, H, Tq, d)
            for b, span, piece in pieces:
                output[b, :, span] = piece[0]
        densities = [plan.density for plan in plans if plan is not None]
        density = sum(densities) / len(densities)
        self._record(LayerRecord(layer, tokens, "sparse", None, density, self._plan_seconds))
        return output

    def refuse(self, layer: int, kind: str | None, reason: str) -> None:
        """Raise UsageError where `fallback="never"` lets no layer run dense for `reason`."""
        if self.fallback == "never":
            named = f"layer {layer}" if kind is None else f"layer {layer} ({kind})"
            raise UsageError(f"sparse prefill cannot run in {named}: {reason} (fallback='never')")

    def _plan(self, layer: int, row: Row, offset: int, query: Tensor, key: Tensor, scale: float) -> BlockPlan | None:
        """The plan of one row's part of a prefill, of query (H, Tq, d) and key (Hkv, Tk, d); None when it has none.

        Static ones are kept from layer to layer.
        """
        if row.first >= row.stop:
            return None
        pattern = self.pattern.for_layer(layer)
        blocks: dict[str, Any] = {
            "key_block": self.key_block,
            "query_block": self.query_block,
            "key_heads": key.shape[0],
        }
        part: dict[str, Any] = {"offset": row.first, "stop": row.stop}
        if pattern.is_dynamic:
            shift = row.start - offset
            queries, keys = slice(row.first + shift, row.stop + shift), slice(row.start, row.start + row.stop)
            with torch.no_grad():
                states = {"query": query[:, queries], "key": key[:, keys]}
                return self._timed_plan(pattern, row.layout, **blocks, **part, **states, scale=scale)
        name = (row.layout, pattern, row.first, row.stop)
        held = self._plans.get(name)
        if held is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            held = self._timed_plan(pattern, row.layout, **blocks, **part)
            self._plans[name] = held
        return held

    def _timed_plan(self, pattern: Pattern, layout: Layout, **arguments: Any) -> BlockPlan:
        start = self.clock()
        plan = build_plan(pattern, layout, **arguments)
        self._plan_seconds += self.clock() - start
        return plan

    def _plan_reason(
        self, layer: int, row: Row, plan: BlockPlan | None, key_heads: int, rule: Calibration
    ) -> str | None:
        """Why a row's plan had better run dense. Static patterns are judged by the plan of the whole row, so that all
        its chunks are treated alike, those that hold none of its tokens included."""
        pattern, length = self.pattern.for_layer(layer), row.layout.length
        if not pattern.is_dynamic:
            name = (row.layout, pattern, 0, length)
            if name not in self._plans:
                blocks: dict[str, Any] = {"key_block": self.key_block, "query_block": self.query_block}
                self._plans[name] = self._timed_plan(pattern, row.layout, **blocks, key_heads=key_heads)
            plan = self._plans[name]
        return None if plan is None else rule.reason(plan, length)

    def _rule(self, query: Tensor, key: Tensor, longest: int) -> Calibration:
        """When to run dense: as given, or measured for this shape where it is needed and no gradients are."""
        if self.calibration is not None:
            return self.calibration
        is_trained = torch.is_grad_enabled() and query.requires_grad
        if query.device.type != "cpu" or is_trained or self.backend not in (None, "gather"):
            return FIXED
        if longest < LENGTHS[0]:  # nothing to measure for
            return Calibration(LENGTHS[:1], (0.0,))
        shape = Shape(query.shape[1], key.shape[1], query.shape[3], query.dtype, self.key_block, self.query_block)
        return calibration_for(shape)

    def _record(self, record: LayerRecord) -> None:
        self.records[record.layer] = record
        if record.reason is not None and record.reason not in self._told:
            self._told.add(record.reason)
            logger.info("sparse prefill: layer %d ran dense: %s", record.layer, record.reason)


def dense_tail(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int = 0) -> Tensor:
    """Causal attention of the last M of N tokens, each to the last `window` (0: to all before it): query (1, H, M, d),
    key and value (1, Hkv, N, d) → (1, H, M, d)."""
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if window:
        mask = mask.triu(keys - queries - window + 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def wrong_length(row: int, described: int, found: int) -> UsageError:
    """The error for a row of `found` tokens whose layout describes `described`; both without padding."""
    return UsageError(
        f"sparse prefill, row {row}: the layout describes {described} tokens, the batch holds {found} without padding; "
        "build the layout from this batch's ids"
    )


def state_of(config: Any) -> SparseState | None:
    """The state of the model with this (text) configuration object, if it is under sparse prefill."""
    return _STATES.get(id(config))


def enter_state(config: Any, state: SparseState) -> None:
    """Put a model under `state`. Raises UsageError when it is under one already."""
    if id(config) in _STATES:
        raise UsageError("the model is under sparse prefill already; leave the first before the second")
    _STATES[id(config)] = state


def leave_state(config: Any) -> None:
    """Take a model out."""
    _STATES.pop(id(config), None)
