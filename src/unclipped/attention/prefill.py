"""`sparse_prefill`: any transformers decoder or vision-language model prefilled under a pattern, in one call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from unclipped.attention.config import SparseConfig
from unclipped.attention.detect import layouts_of_call
from unclipped.attention.layout import Layout
from unclipped.attention.parts import PerLayer, check_lists
from unclipped.attention.patterns import Pattern
from unclipped.attention.state import LayerRecord, SparseState, enter_state, leave_state
from unclipped.attention.syntax import parse_pattern
from unclipped.attention.transformers_interface import NAME, padding_of, register
from unclipped.core.errors import UsageError


@dataclass(frozen=True)
class SparseSummary:
    """The last prefill of a model, over its layers."""

    pattern: str
    sparse_layers: int
    layers: int
    density: float
    """Mean over layers; dense ones count as 1."""
    reasons: tuple[str, ...]
    """Why layers ran dense, each reason once."""


class SparsePrefill:
    """A model under sparse prefill, as `sparse_prefill` returns it. Leaving the context puts the model back."""

    def __init__(self, model: PreTrainedModel, state: SparseState, layouts: Sequence[Layout] | None) -> None:
        self.model, self.state, self._given = model, state, tuple(layouts) if layouts is not None else None
        self.decoder = decoder_of(model)
        self._before: str = self.decoder.config._attn_implementation
        self._hook: Any = None
        self._attach()

    def _attach(self) -> None:
        register()
        enter_state(self.decoder.config, self.state)
        self.decoder.set_attn_implementation(NAME)
        self._hook = self.model.register_forward_pre_hook(self._see, with_kwargs=True)
        self.model.sparse_report = self.report  # type: ignore[assignment]

    def close(self) -> None:
        """Put the model back as it was; a second call does nothing."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        leave_state(self.decoder.config)
        self.decoder.set_attn_implementation(self._before)
        del self.model.sparse_report

    def pause(self, is_paused: bool = True) -> None:
        """Run dense until called again with False."""
        self.state.is_paused = is_paused

    def __enter__(self) -> SparsePrefill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def report(self) -> list[LayerRecord]:
        """What each layer did at its last prefill: sparse at which density, or dense and why."""
        return [self.state.records[layer] for layer in sorted(self.state.records)]

    def summary(self) -> SparseSummary | None:
        """The last prefill over all layers; None before the first."""
        records = self.report()
        if not records:
            return None
        return SparseSummary(
            pattern=str(self.state.pattern),
            sparse_layers=sum(record.mode == "sparse" for record in records),
            layers=len(records),
            density=sum(record.density for record in records) / len(records),
            reasons=tuple(dict.fromkeys(record.reason for record in records if record.reason is not None)),
        )

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each forward: which tokens of each row are visual. A decode step has nothing to be seen."""
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[1] == 1:
            return
        padding = padding_of(kwargs.get("attention_mask"))
        self.state.set_layouts(self._given or layouts_of_call(self.model, ids, padding, kwargs))


def sparse_prefill(
    model: PreTrainedModel,
    pattern: str | Pattern | Sequence[str | Pattern],
    *,
    fallback: Literal["auto", "never"] = "auto",
    key_block: int = 128,
    query_block: int = 256,
    backend: Literal["gather", "reference"] | None = None,
    layouts: Sequence[Layout] | None = None,
) -> SparsePrefill:
    """Prefill `model` under `pattern` from now on, or inside a `with` statement.

    pattern: one for all layers, or a sequence of one a layer (the same as `per_layer`); text is read by the pattern
    syntax. fallback: `auto`
    runs dense, and says why in `model.sparse_report()`, where sparse attention would not pay (short prompts, dense
    plans); `never` runs the pattern at any length and raises where it cannot. Decode steps, and layers with a mask of
    their own (sliding windows), are always as in the model. key_block, query_block, backend: see `build_plan` and
    `sparse_attention`. layouts: of each row of every batch to come, without padding; by default they are read off the
    input ids and image grids of each call.

    Raises UsageError for a bad pattern, a model whose attention cannot be replaced, or one that is under sparse
    prefill already.

    >>> with sparse_prefill(model, "global_text + sink(1) + window(512)") as sparse:  # doctest: +SKIP
    ...     model.generate(**inputs)
    ...     sparse.report()
    """
    if fallback not in ("auto", "never"):
        raise UsageError(f"fallback: expected 'auto' or 'never', found '{fallback}'")
    decoder = decoder_of(model)
    depth = int(decoder.config.num_hidden_layers)
    chosen = read_patterns(pattern, depth)
    check_lists(chosen, layers=depth, key_heads=key_heads_of(decoder.config))
    state = SparseState(chosen, fallback, key_block=key_block, query_block=query_block, backend=backend)
    return SparsePrefill(model, state, layouts)


def read_patterns(pattern: str | Pattern | Sequence[str | Pattern], depth: int) -> Pattern:
    """One pattern from what users give; a list of one for each of `depth` layers becomes `per_layer`.

    Raises UsageError for text that is no pattern and for a list of another length.
    """
    given = [pattern] if isinstance(pattern, (str, Pattern)) else list(pattern)
    patterns = [parse_pattern(item) if isinstance(item, str) else item for item in given]
    if len(patterns) not in (1, depth):
        raise UsageError(f"pattern: expected one, or one for each of the {depth} layers, found {len(patterns)}")
    return patterns[0] if len(patterns) == 1 else PerLayer(tuple(patterns))


def key_heads_of(config: Any) -> int:
    """Key heads of a decoder's attention, by its configuration."""
    heads = getattr(config, "num_key_value_heads", None)
    return int(heads if isinstance(heads, int) else config.num_attention_heads)


def prefill_with(model: PreTrainedModel, config: SparseConfig) -> SparsePrefill:
    """`sparse_prefill` as a configuration describes it."""
    return sparse_prefill(
        model,
        config.pattern,
        fallback=config.fallback,
        key_block=config.key_block,
        query_block=config.query_block,
    )


def decoder_of(model: PreTrainedModel) -> Any:
    """The language model inside. Raises UsageError when its attention does not go through transformers' interface."""
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or not hasattr(decoder.config, "num_hidden_layers"):
        raise UsageError(f"{type(model).__name__}: found no decoder to prefill sparsely ({type(decoder).__name__})")
    attentions = {type(module) for module in decoder.modules() if "Attention" in type(module).__name__}
    for attention in sorted(attentions, key=lambda kind: kind.__name__):
        if "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(sys.modules[attention.__module__]):
            raise UsageError(
                f"{type(decoder).__name__}: {attention.__name__} computes its attention itself and not through "
                "transformers' attention interface, so it cannot be replaced; use a model that supports "
                "set_attn_implementation"
            )
    if not attentions:
        raise UsageError(f"{type(decoder).__name__}: found no attention modules that could run a pattern")
    if not decoder._supports_sdpa:
        raise UsageError(
            f"{type(decoder).__name__} does not run on scaled_dot_product_attention, to which sparse prefill falls "
            "back for decode steps; use a model with sdpa support"
        )
    return decoder
