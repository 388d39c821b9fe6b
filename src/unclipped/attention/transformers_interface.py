"""Sparse prefill as an attention implementation of transformers: one mask function, one attention function.

transformers asks the mask function once a forward for each kind of layer and hands whatever it returns, unchanged, to
the attention function of every layer. What is returned here says which rows may run sparsely, over which layout, and
builds the ordinary mask only when some layer asks for it: at 16k tokens a mask of a padded batch is 256 MB a row.
Both functions must be registered: without a mask function transformers passes no mask at all, padded batches included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from unclipped.attention.rows import OwnMask
from unclipped.attention.state import PrefillRows, SparseState, state_of
from unclipped.core.errors import UsageError

NAME = "unclipped_sparse"
# Arguments of attention layers that change the logits; block lists know nothing of them.
UNSUPPORTED = ("softcap", "position_bias", "s_aux")


class SparseMask(Tensor):
    """What the mask function hands to the attention function of each layer.

    A boolean (B, 1, Tq, Tk) of a single stored element, because `generate` prepares the masks of a static cache before
    it calls the model, and models pass on what is a tensor of four axes. Its values are never read: the ordinary mask
    is `dense()`.
    """

    state: SparseState
    padding: Tensor | None
    _build: Callable[[], Tensor | None]
    _find_rows: Callable[[int], PrefillRows]
    _found: dict[str, Any]

    @classmethod
    def of(
        cls,
        state: SparseState,
        shape: tuple[int, int, int, int],
        padding: Tensor | None,
        build: Callable[[], Tensor | None],
        find_rows: Callable[[int], PrefillRows],
    ) -> SparseMask:
        mask: SparseMask = torch.ones((), dtype=torch.bool).expand(shape).as_subclass(cls)
        mask.state, mask.padding, mask._build, mask._find_rows, mask._found = state, padding, build, find_rows, {}
        return mask

    def contiguous(self, *args: Any, **kwargs: Any) -> SparseMask:
        return self

    def dense(self) -> Tensor | None:
        """The ordinary boolean mask (B, 1, Tq, Tk), or None for plain causal attention; built at the first call."""
        if "dense" not in self._found:
            self._found["dense"] = self._build()
        return self._found["dense"]

    def rows(self, window: int = 0) -> PrefillRows:
        """Rows that may run sparsely: asked by the layers, when the layouts of the forward are known. window: the
        sliding window that the layer states, 0 for none."""
        if "rows" not in self._found:
            self._found["rows"] = self._find_rows(window)
        return self._found["rows"]


def padding_of(attention_mask: Any) -> Tensor | None:
    """The padding (B, Tk), true where a token is, in whatever a model was called with; None when it names none."""
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()), None)
    if isinstance(attention_mask, SparseMask):
        return attention_mask.padding
    return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None


def stands_behind(padding: Tensor | None) -> bool:
    """Whether the padding of `padding` (B, Tk), true where a token is, stands behind all tokens of its row."""
    return padding is not None and padding.ndim == 2 and not bool((padding[:, 1:] > padding[:, :-1]).any())


def sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **rest: Any,
) -> SparseMask | Tensor | None:
    """The mask function. `attention_mask` (B, Tk) bool marks what is no padding.

    Decode steps and models without a pattern get transformers' own mask, so that they behave and compile as with sdpa.
    """

    def rows_from(
        offset: int | Tensor, length: int, allow_skip: bool, padding: Tensor | None = attention_mask
    ) -> Tensor | None:
        arguments = {**rest, "allow_is_causal_skip": rest.get("allow_is_causal_skip", True) and allow_skip}
        return sdpa_mask(
            batch_size=batch_size,
            q_length=length,
            kv_length=kv_length,
            q_offset=offset,  # type: ignore[arg-type] - a static cache gives a tensor
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=padding,
            **arguments,
        )

    def build() -> Tensor | None:
        return rows_from(q_offset, q_length, allow_skip=True)

    if q_length == 1:  # first, because a compiled decode step cannot look a state up
        return build()
    state = state_of(config)
    if state is None:
        return build()

    def build_dense() -> Tensor | None:
        """Padding behind all tokens is left to causality: with a mask, torch forms all pairs, not the causal half."""
        is_behind = mask_function is causal_mask_function and stands_behind(attention_mask)
        return rows_from(q_offset, q_length, allow_skip=True, padding=None if is_behind else attention_mask)

    if state.is_paused:
        return build_dense()
    # A static cache gives its live count, which the first layer moves on before any later layer asks.
    q_offset = int(q_offset)

    def sees(places: Sequence[int]) -> Tensor:
        rows = [rows_from(place, 1, allow_skip=False) for place in places]
        seen = torch.cat([row[:, 0] for row in rows if row is not None], dim=1)  # (B, places, Tk)
        return F.pad(seen, (kv_offset, 0))

    def pairs(queries: Tensor, keys: Tensor) -> Tensor:
        device = rest.get("device", "cpu")
        batch, queries, keys = torch.arange(batch_size, device=device), queries.to(device), keys.to(device)
        head = batch.new_zeros(())
        if not rest.get("use_vmap"):
            return mask_function(batch[:, None], head, queries[None], keys[None]).expand(batch_size, len(queries))
        with TransformGetItemToIndex():  # functions that users hand in are called pair by pair, as transformers does
            of_pairs = torch.vmap(mask_function, in_dims=(None, None, 0, 0))
            return torch.vmap(of_pairs, in_dims=(0, None, None, None))(batch, head, queries, keys)

    def find_rows(window: int) -> PrefillRows:
        is_causal = mask_function is causal_mask_function and not kv_offset
        own = None if is_causal else OwnMask(sees, pairs, window, kv_offset)
        return state.rows_of(batch_size, q_length, int(q_offset), attention_mask, own)

    return SparseMask.of(state, (batch_size, 1, q_length, kv_length), attention_mask, build_dense, find_rows)


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SparseMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (B, H, Tq, d), key and value (B, Hkv, Tk, d) → (B, Tq, H, d) and no weights.

    Raises UsageError for `output_attentions=True`: attention weights are never formed.
    """
    if kwargs.get("output_attentions"):
        raise UsageError(
            f"{NAME}: attention weights are never formed, so output_attentions=True cannot be served; "
            "call set_attn_implementation('eager') for it"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UsageError(
                f"{NAME}: {type(module).__name__} passes '{name}', which sparse attention does not compute; "
                "run this model with its own attention"
            )
    layer = getattr(module, "layer_idx", 0)
    if not isinstance(attention_mask, SparseMask):
        if attention_mask is not None and query.shape[2] > 1:
            refuse_given_mask(module, layer)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = attention_mask.rows(int(kwargs.get("sliding_window") or 0))
    output = attention_mask.state.attend(
        query, key, value, rows, layer=layer, scale=scale, dropout=dropout, kind=layer_kind(module, layer)
    )
    if output is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask.dense(), dropout=dropout, scaling=scaling, **kwargs
        )
    return output.transpose(1, 2).contiguous(), None  # (B, Tq, H, d)


def refuse_given_mask(module: nn.Module, layer: int) -> None:
    """Raise UsageError when a prefill under `fallback="never"` comes with a mask of four axes, which runs dense."""
    state = state_of(getattr(module, "config", None))
    if state is not None and not state.is_paused:
        state.refuse(layer, layer_kind(module, layer), "the model was called with a mask of four axes")


def layer_kind(module: nn.Module, layer: int) -> str | None:
    """The type of a layer by the model's configuration, such as `sliding_attention`; None where it names none."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    return kinds[layer] if kinds is not None and layer < len(kinds) else None


def register() -> None:
    """Enter `unclipped_sparse` in both interfaces of transformers; may be called any number of times."""
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, sparse_mask)
