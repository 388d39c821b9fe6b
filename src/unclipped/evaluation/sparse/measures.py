"""Measures of a pattern on one prompt: the attention it keeps, and what it does to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclipped.attention.calibration import FIXED
from unclipped.attention.layout import Layout
from unclipped.attention.mass import BlockMass, block_mass, kept_mass
from unclipped.attention.observe import observed
from unclipped.attention.patterns import Pattern
from unclipped.attention.plan import build_plan
from unclipped.attention.prefill import sparse_prefill
from unclipped.core.errors import UsageError
from unclipped.data.sample import Sample
from unclipped.encoding.collate import collate_prompts
from unclipped.inference.engine import Engine

Blocks = tuple[int, int]
"""(key block, query block) in tokens."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model takes it."""

    id: str
    inputs: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


@dataclass(frozen=True, eq=False)
class PatternMass:
    """What one pattern keeps, by layer (those that can run patterns) and query head."""

    density: np.ndarray
    """(layers, Hkv)"""
    kept: np.ndarray
    """Share of all attention kept in each modality pair: (3, layers, H, 4), for the pattern, oracle and random."""


@dataclass(frozen=True, eq=False)
class PromptMass:
    """Recovered mass of several patterns on one prompt."""

    layers: list[int]
    attention: np.ndarray
    """Share of all attention in each modality pair, (layers, H, 4)."""
    patterns: list[PatternMass]


@dataclass(frozen=True)
class NextToken:
    """The next token under a pattern against dense."""

    kl: float
    """KL(dense ‖ sparse), nats."""
    agrees: bool
    """Whether both have the same most likely token."""
    density: float
    """Attended pairs over causal ones, mean over layers; dense layers count as 1."""


def prompt_of(engine: Engine, sample: Sample) -> Prompt:
    """A sample, without its answer, on the engine's device."""
    inputs = dict(collate_prompts([engine.encode(sample)], engine.processor))
    inputs = {name: value.to(engine.device) for name, value in inputs.items() if name != "attention_mask"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(engine.model.dtype)
    return Prompt(sample.id, inputs)


@torch.inference_mode()
def prompt_mass(model: Any, prompt: Prompt, patterns: Sequence[tuple[Pattern, Blocks]]) -> PromptMass:
    """Run the prompt dense and see what each pattern would keep of every layer's attention.

    Raises UsageError when no layer can run a pattern.
    """
    layers: list[int] = []
    attention: list[np.ndarray] = []
    density: list[list[np.ndarray]] = [[] for _ in patterns]
    kept: list[list[np.ndarray]] = [[] for _ in patterns]

    def on_layer(layer: int, layout: Layout, query: Tensor, key: Tensor, scale: float) -> None:
        masses: dict[Blocks, BlockMass] = {}
        for index, (pattern, blocks) in enumerate(patterns):
            sizes = {"key_block": blocks[0], "query_block": blocks[1]}
            if blocks not in masses:
                masses[blocks] = block_mass(query, key, layout, scale=scale, **sizes)
            own = pattern.for_layer(layer)
            plan = build_plan(own, layout, **sizes, query=query, key=key, scale=scale, key_heads=len(key))
            found = kept_mass(masses[blocks], plan, len(key))
            density[index].append(found.density)
            kept[index].append(np.stack([found.pattern, found.oracle, found.random]))  # (3, H, 4)
        layers.append(layer)
        attention.append(next(iter(masses.values())).by_pair)

    with observed(model, on_layer) as state:
        model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    if not layers:
        raise UsageError(
            f"{type(model).__name__}: no layer can run a pattern; layers {state.own_masks} have a mask of their own"
        )
    found = [PatternMass(np.stack(own), np.stack(keeps, axis=1)) for own, keeps in zip(density, kept, strict=True)]
    return PromptMass(layers, np.stack(attention), found)


@torch.inference_mode()
def next_token_logits(model: Any, prompt: Prompt, suppressed: Sequence[int] = ()) -> Tensor:
    """Logits of the token behind the prompt, float64 (vocabulary,), -inf at tokens that are never written."""
    logits = model(**prompt.inputs, use_cache=False, logits_to_keep=1).logits[0, -1].double().cpu()
    logits[list(suppressed)] = float("-inf")
    return logits


def next_token(
    model: Any, prompt: Prompt, dense: Tensor, pattern: Pattern, blocks: Blocks, suppressed: Sequence[int] = ()
) -> NextToken:
    """The next token under a pattern, which runs at any length, against the `dense` logits."""
    with sparse_prefill(
        model, pattern, fallback="never", key_block=blocks[0], query_block=blocks[1], calibration=FIXED
    ) as sparse:
        logits = next_token_logits(model, prompt, suppressed)
        summary = sparse.summary()
    assert summary is not None, "the prompt was just prefilled"
    return NextToken(divergence(dense, logits), int(logits.argmax()) == int(dense.argmax()), summary.density)


def divergence(first: Tensor, second: Tensor) -> float:
    """KL(first ‖ second) of the distributions of two vectors of logits, nats; tokens at -inf in both are left out."""
    possible = torch.isfinite(first) & torch.isfinite(second)
    one, two = first[possible].log_softmax(dim=0), second[possible].log_softmax(dim=0)
    return max(0.0, float((one.exp() * (one - two)).sum()))
