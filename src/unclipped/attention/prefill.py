"""`sparse_prefill`: any transformers decoder or vision-language model prefilled under a pattern, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unclipped.attention.calibration import FIXED, Calibration
from unclipped.attention.config import SparseConfig
from unclipped.attention.detect import check_replaceable, key_heads_of, layouts_of_call
from unclipped.attention.layout import Layout
from unclipped.attention.parts import PerLayer, check_lists
from unclipped.attention.pattern_file import is_pattern_file, read_pattern_file
from unclipped.attention.patterns import Pattern
from unclipped.attention.state import LayerRecord, Prompt, SparseState, enter_state, leave_state, wrong_length
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
        self._hooks: list[Any] = []
        self._generation: ContextVar[Prompt | str | None] = ContextVar("generation", default=None)
        self._seen: WeakKeyDictionary[Any, SeenTokens] = WeakKeyDictionary()
        self._attach()

    def _attach(self) -> None:
        register()
        enter_state(self.decoder.config, self.state)
        self.decoder.set_attn_implementation(NAME)
        self._hooks = [
            self.model.register_forward_pre_hook(self._see, with_kwargs=True),
            self.model.register_forward_hook(self._remember, with_kwargs=True),
        ]
        self.model.sparse_report = self.report  # type: ignore[assignment]
        self.model.generate = self._generate  # type: ignore[assignment]

    def close(self) -> None:
        """Put the model back as it was; a second call does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        leave_state(self.decoder.config)
        self.decoder.set_attn_implementation(self._before)
        del self.model.sparse_report, self.model.generate

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

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, during which the whole prompt is known, whatever chunks it is run in."""
        ids: Tensor | None = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        cache = kwargs.get("past_key_values")
        prompt: Prompt | str | None = None
        if not held_tokens(cache):  # behind earlier tokens it is not known whether `ids` repeat them
            padding = padding_of(kwargs.get("attention_mask"))
            found = self._given or layouts_of_call(self.model, ids, padding, kwargs)
            if not isinstance(found, str):
                self._check_given(found, ids, padding)
            prompt = found if isinstance(found, str) else Prompt(found, "generation")
        token = self._generation.set(prompt)
        try:
            return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[operator]
        finally:
            self._generation.reset(token)

    def _check_given(self, layouts: tuple[Layout, ...], ids: Tensor | None, padding: Tensor | None) -> None:
        if ids is None or len(layouts) != len(ids):
            return
        for row, layout in enumerate(layouts):
            found = ids.shape[1] if padding is None else int(padding[row, : ids.shape[1]].sum())
            if layout.length != found:
                raise wrong_length(row, layout.length, found)

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each forward: which tokens of each row are visual. A decode step has nothing to be seen."""
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[1] == 1:
            return
        prompt = self._generation.get()
        if prompt is None:
            prompt = self._prompt_of_call(ids, kwargs)
        elif isinstance(prompt, Prompt) and ids is not None and len(ids) != len(prompt.layouts):
            copies = len(ids) // len(prompt.layouts)  # beams and several answers repeat the rows
            prompt = Prompt(tuple(layout for layout in prompt.layouts for _ in range(copies)), "generation")
        self.state.set_prompt(prompt)

    def _prompt_of_call(self, ids: Tensor | None, kwargs: dict[str, Any]) -> Prompt | str:
        """What is known of the prompt in a forward outside `generate`."""
        cache = kwargs.get("past_key_values")
        if self._given is not None:
            uses_cache = cache is not None or kwargs.get("use_cache") is True
            return Prompt(self._given, "chunks" if uses_cache else "forward")
        padding = padding_of(kwargs.get("attention_mask"))
        earlier = held_tokens(cache)
        if not earlier or ids is None:
            found = layouts_of_call(self.model, ids, padding, kwargs, is_cut=kwargs.get("use_cache") is True)
            return found if isinstance(found, str) else Prompt(found, "so far" if cache is not None else "forward")
        before = self._seen.get(cache)
        if before is None:
            return "the forward continues a cache whose tokens were not seen"
        together = before.followed_by(ids, earlier, kwargs.get("image_grid_thw"))
        found = layouts_of_call(
            self.model, together.ids, padding, {**kwargs, "image_grid_thw": together.grids}, is_cut=True
        )
        return found if isinstance(found, str) else Prompt(found, "so far")

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After a forward that is no decode step: the tokens that its cache now holds, for chunks that follow."""
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.shape[1] == 1:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return
        grids = kwargs.get("image_grid_thw")
        earlier = held_tokens(cache) - ids.shape[1]
        before = self._seen.get(cache)
        if before is not None and earlier > 0:
            self._seen[cache] = before.followed_by(ids, earlier, grids)
        elif earlier == 0:
            self._seen[cache] = SeenTokens(ids, grids)


@dataclass(frozen=True)
class SeenTokens:
    """The tokens that a cache holds."""

    ids: Tensor
    """(B, T); -1 where a decode step wrote a token, which is text."""
    grids: Tensor | None
    """`image_grid_thw` of all images so far, (images, 3)."""

    def followed_by(self, ids: Tensor, earlier: int, grids: Tensor | None) -> SeenTokens:
        """With `ids` (B, n) behind the first `earlier` tokens."""
        decoded = self.ids.new_full((len(ids), max(0, earlier - self.ids.shape[1])), -1)
        both = [given for given in (self.grids, grids) if given is not None]
        return SeenTokens(torch.cat([self.ids[:, :earlier], decoded, ids], dim=1), torch.cat(both) if both else None)


def held_tokens(cache: Any) -> int:
    """Tokens in a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def sparse_prefill(
    model: PreTrainedModel,
    pattern: str | Pattern | Sequence[str | Pattern],
    *,
    fallback: Literal["auto", "never"] = "auto",
    key_block: int | None = None,
    query_block: int | None = None,
    backend: Literal["gather", "triton", "flex", "reference"] | None = None,
    layouts: Sequence[Layout] | None = None,
    calibration: Calibration | Literal["measured", "fixed"] = "measured",
) -> SparsePrefill:
    """Prefill `model` under `pattern` from now on, or inside a `with` statement.

    pattern: one for all layers, or a sequence of one a layer (the same as `per_layer`); text is read by the pattern
    syntax, and a path that ends in .yaml is a pattern file. fallback: `auto` runs dense, and says why in
    `model.sparse_report()`, where sparse attention would not pay (short prompts, dense plans); `never` runs the pattern
    at any length and raises where it cannot. Decode steps are always as in the model. A layer with a sliding window of
    its own runs the keys that window and pattern both allow. key_block, query_block, backend: see `build_plan` and
    `sparse_attention`; blocks are those of the pattern file, or 128 and 256, unless given. layouts: of each row of
    every batch to come, without padding; by default they are read off the input ids and image grids of each call.
    calibration: the rule of `auto`, measured on a CPU once and kept in the user's cache, or fixed at 4,096 tokens and a
    density of 0.5, which gradients and other devices always take.

    Raises UsageError for a bad pattern, a model whose attention cannot be replaced, or one that is under sparse
    prefill already.

    >>> with sparse_prefill(model, "global_text + sink(1) + window(512)") as sparse:  # doctest: +SKIP
    ...     model.generate(**inputs)
    ...     sparse.report()
    """
    if fallback not in ("auto", "never"):
        raise UsageError(f"fallback: expected 'auto' or 'never', found '{fallback}'")
    if isinstance(calibration, str) and calibration not in ("measured", "fixed"):
        raise UsageError(f"calibration: expected 'measured', 'fixed' or a Calibration, found '{calibration}'")
    rule = None if calibration == "measured" else FIXED if isinstance(calibration, str) else calibration
    if isinstance(pattern, str) and is_pattern_file(pattern):
        held = read_pattern_file(pattern)
        pattern = held.pattern
        key_block = held.key_block if key_block is None else key_block
        query_block = held.query_block if query_block is None else query_block
    decoder = decoder_of(model)
    depth = int(decoder.config.num_hidden_layers)
    chosen = read_patterns(pattern, depth)
    check_lists(chosen, layers=depth, key_heads=key_heads_of(decoder.config))
    state = SparseState(
        chosen,
        fallback,
        key_block=128 if key_block is None else key_block,
        query_block=256 if query_block is None else query_block,
        backend=backend,
        calibration=rule,
    )
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


def prefill_with(model: PreTrainedModel, config: SparseConfig) -> SparsePrefill:
    """`sparse_prefill` as a configuration describes it."""
    return sparse_prefill(
        model,
        config.pattern,
        fallback=config.fallback,
        key_block=config.key_block,
        query_block=config.query_block,
        calibration=config.calibration,
    )


def decoder_of(model: PreTrainedModel) -> Any:
    """The language model inside. Raises UsageError when its attention does not go through transformers' interface."""
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or not hasattr(decoder.config, "num_hidden_layers"):
        raise UsageError(f"{type(model).__name__}: found no decoder to prefill sparsely ({type(decoder).__name__})")
    check_replaceable(decoder)
    return decoder
