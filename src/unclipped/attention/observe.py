"""Queries and keys of every layer of a dense prefill, handed to a function: what measures of patterns start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Full
from unclipped.attention.prefill import SparsePrefill
from unclipped.attention.state import OWN_MASK, PrefillRows, SparseState
from unclipped.core.errors import UsageError

OnLayer = Callable[[int, Layout, Tensor, Tensor, float], None]
"""Called with the number of the layer, the row's layout, query (H, N, d), key (Hkv, N, d), positions applied, and the
scale of the scores."""


class _Observing(SparseState):
    """Runs every layer dense and shows what it is given."""

    def __init__(self, on_layer: OnLayer) -> None:
        super().__init__(Full(), "auto", key_block=128, query_block=256, backend=None)
        self.on_layer = on_layer
        self.own_masks: list[int] = []
        """Layers that have a mask of their own, on which no pattern runs."""

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
        if prefill.reason is not None:
            if prefill.refusable and prefill.reason != OWN_MASK:
                raise UsageError(f"measuring attention, layer {layer}: {prefill.reason}")
            self.own_masks.append(layer)
        for row, own, keys in zip(prefill.rows, query, key, strict=False):
            if row.first or row.stop != row.layout.length:
                raise UsageError("measuring attention: the prompt came in chunks; give it in one forward")
            span = slice(row.start, row.start + row.layout.length)
            self.on_layer(layer, row.layout, own[:, span], keys[:, span], scale)
        return None


@contextmanager
def observed(model: PreTrainedModel, on_layer: OnLayer) -> Iterator[_Observing]:
    """Inside, prefills of `model` run dense and `on_layer` sees each layer's attention. Raises as `sparse_prefill`."""
    state = _Observing(on_layer)
    with SparsePrefill(model, state, None):
        yield state
