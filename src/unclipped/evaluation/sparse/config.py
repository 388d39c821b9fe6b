"""Settings of `unclipped prefill quality`, `bench` and `search`. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from unclipped.attention.config import SparseConfig
from unclipped.core.config import (
    BatchSize,
    BlockTokens,
    FrozenConfig,
    Layers,
    Name,
    Number,
    PathText,
    PatternText,
    Resamples,
    Seed,
    Share,
    Threads,
    Tokens,
    Whole,
)
from unclipped.evaluation.config import TaskConfig

CANDIDATES = (
    "sink(128) + window(512)",
    "sink(128) + window(1024)",
    "global_text + sink(128) + window2d(4, 4)",
    "global_text + sink(128) + window2d(8, 8)",
    "vertical_slash(4, 4)",
    "global_text + vertical_slash(4, 4)",
    "vertical_slash(12, 8)",
    "topk(2)",
    "topk(4)",
    "topk(8)",
    "topk(16)",
    "global_text + sink(128) + topk(8)",
)
"""What a search chooses from unless told otherwise; `full` is always among the choices."""


class PatternArm(SparseConfig):
    """A pattern that is measured, with a name for tables."""

    fallback: Literal["auto", "never"] = "never"
    """`never`: the pattern at any length. `auto` measures what a user gets, dense fallback included."""
    calibration: Literal["measured", "fixed"] = "fixed"
    name: Name = ""
    """Name in tables and plots; by default the pattern's text."""

    @property
    def label(self) -> str:
        """The name shown."""
        return self.name or (self.pattern if isinstance(self.pattern, str) else " | ".join(self.pattern))


def _distinct(arms: tuple[PatternArm, ...]) -> tuple[PatternArm, ...]:
    names = [arm.label for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the pattern '{twice[0]}' stands there twice; name each once")
    return arms


class QualityConfig(FrozenConfig):
    """What `prefill quality` measures."""

    model: PathText
    """Model folder in our format (or hub id)."""
    task: TaskConfig
    """Questions whose prompts are measured and whose answers are scored."""
    patterns: Annotated[tuple[PatternArm, ...], Field(min_length=1, max_length=1000)]
    """The patterns, each measured against dense."""
    score: bool = True
    """Also answer every question dense and under each pattern, and report the paired difference of the scores."""
    batch_size: BatchSize = 8
    """Questions answered together."""
    bootstrap_samples: Resamples = 2000
    """Number of bootstrap resamples."""
    seed: Seed = 0
    """Seed of the bootstrap and of random selections."""

    @field_validator("patterns")
    @classmethod
    def _named_once(cls, patterns: tuple[PatternArm, ...]) -> tuple[PatternArm, ...]:
        return _distinct(patterns)


class SearchConfig(FrozenConfig):
    """What `prefill search` looks for."""

    model: PathText
    """Model folder in our format (or hub id)."""
    task: TaskConfig
    """Prompts: the first `limit` of the source. Every other one chooses, the rest verify."""
    candidates: Annotated[tuple[PatternText, ...], Field(min_length=1, max_length=1000)] = CANDIDATES
    """Patterns to choose from for each layer."""
    kl: Annotated[Number, Field(gt=0, le=100)] = 0.05
    """Bound on the mean KL(dense ‖ sparse) of the next token, nats."""
    mass: Share = 0.0
    """Least recovered attention mass of every layer, on the prompts that choose. 0: no bound."""
    density: Annotated[Share, Field(gt=0)] = 1.0
    """Largest mean density allowed."""
    per_head: bool = False
    """Choose for each key head (its group of query heads) and not only for each layer."""
    rulers: bool = True
    """Also measure random and oracle selection at the density of every point of the frontier."""
    key_block: BlockTokens = 128
    query_block: BlockTokens = 256
    score: bool = False
    """Also answer the task's questions dense and under every point of the frontier."""
    batch_size: BatchSize = 8
    """Questions answered together."""
    steps: Annotated[Whole, Field(ge=1, le=1000)] = 6
    """Refinements between the last combination that holds and the first that does not."""
    seed: Seed = 0
    """Seed of random selections."""

    @model_validator(mode="after")
    def _can_be_split(self) -> SearchConfig:
        if self.task.limit is not None and self.task.limit < 2:
            raise ValueError("limit: a search needs at least 2 prompts, one to choose and one to verify")
        if self.query_block % self.key_block:
            raise ValueError(f"query_block ({self.query_block}) must be a multiple of key_block ({self.key_block})")
        return self


SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "layers": 28, "heads": 16, "key_heads": 8},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "layers": 28, "heads": 16, "key_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "layers": 36, "heads": 32, "key_heads": 8},
}
"""Shapes of Qwen3 decoders with heads of 128, for benchmarks with random weights."""


class BenchConfig(FrozenConfig):
    """What `prefill bench` times."""

    model: PathText
    """A model folder, or the name of a shape (0.6b, 1.7b, 8b) for a decoder with random weights."""
    tokens: Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=100)] = (1024, 4096)
    """Prompt lengths: tokens of a decoder, visual tokens of a vision-language model."""
    patterns: Annotated[tuple[PatternArm, ...], Field(min_length=1, max_length=1000)]
    layers: Layers | None = None
    """Cut a shape to so many layers."""
    dtype: Literal["fp32", "bf16", "own"] = "own"
    """`own`: that of the checkpoint; bf16 for shapes."""
    device: Name = "auto"
    threads: Threads | None = None
    """Threads of torch, pinned for all measurements; null: as it is."""
    repeats: Annotated[Whole, Field(ge=1, le=10_000)] = 7
    """Interleaved repeats; medians and their smallest and largest are reported."""
    seed: Seed = 0

    @field_validator("patterns")
    @classmethod
    def _named_once(cls, patterns: tuple[PatternArm, ...]) -> tuple[PatternArm, ...]:
        return _distinct(patterns)

    @field_validator("tokens")
    @classmethod
    def _ascending(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(tokens)) < len(tokens) or min(tokens) < 16:
            raise ValueError(f"expected different lengths of at least 16 tokens, found {list(tokens)}")
        return tuple(sorted(tokens))
