"""What a model under sparse prefill knows: its pattern, the layouts of the current call, and what each layer did."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Pattern
from unclipped.attention.plan import BlockPlan, build_plan, dense_reason
from unclipped.attention.sparse import sparse_attention
from unclipped.core.errors import UsageError

Fallback = Literal["auto", "never"]
logger = logging.getLogger("unclipped.attention")

# By the identity of a configuration. A state lives in its model's hold, so it goes with the model, and another
# configuration that later gets the same identity finds nothing.
_STATES: WeakValueDictionary[int, SparseState] = WeakValueDictionary()


@dataclass(frozen=True)
class Row:
    """One row of a batch: its tokens without padding, [start, start + layout.length)."""

    start: int
    layout: Layout


@dataclass(frozen=True)
class PrefillRows:
    """The rows of one forward, or why it runs dense whatever the pattern."""

    rows: tuple[Row, ...] = ()
    reason: str | None = None
    refusable: bool = False
    """Whether `fallback="never"` makes the reason an error; decode and layers with a mask of their own are no error."""


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


class SparseState:
    """Pattern, fallback rule and records of one attached model."""

    def __init__(
        self, pattern: Pattern, fallback: Fallback, *, key_block: int, query_block: int, backend: str | None
    ) -> None:
        """Blocks in tokens, as `build_plan` takes them."""
        self.pattern, self.fallback, self.backend = pattern, fallback, backend
        self.key_block, self.query_block = key_block, query_block
        self.records: dict[int, LayerRecord] = {}
        self.is_paused = False
        # Of this thread's forward: rows of the batch as tokens, with padding, and why there are none.
        self._layouts: ContextVar[tuple[Layout, ...] | str] = ContextVar("layouts", default="the model was not called")
        self._plans: dict[tuple[Layout, Pattern], BlockPlan] = {}
        self._told: set[str] = set()

    def set_layouts(self, layouts: tuple[Layout, ...] | str) -> None:
        """The rows of the forward that begins, each without its padding, or the reason why they are not known."""
        self._layouts.set(layouts)

    def rows_of(
        self, batch_size: int, q_length: int, q_offset: int, padding: Tensor | None, *, is_causal: bool
    ) -> PrefillRows:
        """Rows that may run sparsely. `padding` (B, Tk) bool, true where a token is.

        Raises UsageError when a given layout has another length than the row's tokens.
        """
        if q_offset > 0:
            return PrefillRows(reason="the forward continues a cache: decode, verification and later chunks are dense")
        if not is_causal:
            return PrefillRows(reason="the layer has a mask of its own (window, packing, two-way images)")
        layouts = self._layouts.get()
        if isinstance(layouts, str):
            return PrefillRows(reason=layouts, refusable=True)
        if len(layouts) != batch_size:
            raise UsageError(f"sparse prefill: {len(layouts)} layouts for a batch of {batch_size}; give one a row")
        if padding is None:
            starts, lengths = [0] * batch_size, [q_length] * batch_size
        else:
            here = padding[:, :q_length]  # (B, Tq); a static cache is longer
            changes = (here[:, 1:] != here[:, :-1]).sum(dim=1)  # (B,)
            if bool((changes > 1).any()):
                return PrefillRows(reason="the attention mask has gaps", refusable=True)
            starts, lengths = here.int().argmax(dim=1).tolist(), here.sum(dim=1).tolist()
        for row, (layout, length) in enumerate(zip(layouts, lengths, strict=True)):
            if layout.length != length:
                raise UsageError(
                    f"sparse prefill, row {row}: the layout describes {layout.length} tokens, the batch holds {length} "
                    "without padding; build the layout from this batch's ids"
                )
        return PrefillRows(tuple(Row(start, layout) for start, layout in zip(starts, layouts, strict=True)))

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
    ) -> Tensor | None:
        """Sparse output (B, H, Tq, d), zero at padding, or None when the layer is to run dense; records which.

        Raises UsageError with `fallback="never"` when the pattern cannot be run.
        """
        tokens = max((row.layout.length for row in prefill.rows), default=query.shape[2])
        reason, refusable = prefill.reason, prefill.refusable
        if reason is None and dropout > 0:
            reason, refusable = f"attention dropout of {dropout:g}", True
        plans: list[BlockPlan] = []
        if reason is None and self.fallback == "auto":
            reason = next((r for row in prefill.rows if (r := dense_reason(row.layout.length))), None)
        if reason is None:
            plans = [self._plan(layer, row, query[b], key[b], scale) for b, row in enumerate(prefill.rows)]
            if self.fallback == "auto":
                reason = next((plan.reason for plan in plans if plan.reason), None)
        if reason is not None:
            if refusable and self.fallback == "never":
                raise UsageError(f"sparse prefill cannot run in layer {layer}: {reason} (fallback='never')")
            self._record(LayerRecord(layer, tokens, "dense", reason, 1.0))
            return None
        output = torch.zeros_like(query)  # (B, H, Tq, d)
        pieces = []
        for b, (row, plan) in enumerate(zip(prefill.rows, plans, strict=True)):
            span = slice(row.start, row.start + row.layout.length)
            arguments = (query[b : b + 1, :, span], key[b : b + 1, :, span], value[b : b + 1, :, span])
            pieces.append((b, span, sparse_attention(*arguments, plan, scale=scale, backend=self.backend)))
        if len(pieces) == 1 and pieces[0][1] == slice(0, query.shape[2]):
            output = pieces[0][2]
        else:
            for b, span, piece in pieces:
                output[b, :, span] = piece[0]
        density = sum(plan.density for plan in plans) / len(plans)
        self._record(LayerRecord(layer, tokens, "sparse", None, density))
        return output

    def _plan(self, layer: int, row: Row, query: Tensor, key: Tensor, scale: float) -> BlockPlan:
        """The plan of one row, of query (H, Tq, d) and key (Hkv, Tk, d); static ones are kept from layer to layer."""
        pattern = self.pattern.for_layer(layer)
        if pattern.is_dynamic:
            span = slice(row.start, row.start + row.layout.length)
            with torch.no_grad():
                return build_plan(
                    pattern,
                    row.layout,
                    key_block=self.key_block,
                    query_block=self.query_block,
                    query=query[:, span],
                    key=key[:, span],
                    scale=scale,
                )
        held = self._plans.get((row.layout, pattern))
        if held is None:
            if len(self._plans) >= 64:
                self._plans.clear()
            held = build_plan(pattern, row.layout, key_block=self.key_block, query_block=self.query_block)
            self._plans[row.layout, pattern] = held
        return held

    def _record(self, record: LayerRecord) -> None:
        self.records[record.layer] = record
        if record.reason is not None and record.reason not in self._told:
            self._told.add(record.reason)
            logger.info("sparse prefill: layer %d ran dense: %s", record.layer, record.reason)


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
