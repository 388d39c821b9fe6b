"""Rulers of a pattern: as many key blocks for every query block, the best by true attention, or at random.

Both are patterns, so a model can run under them: what the oracle loses no choice at this density saves, and a pattern
that does no better than random chooses nothing. They are no part of the text syntax, because the oracle computes dense
attention to choose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from unclipped.attention.blocks import Blocks
from unclipped.attention.mass import block_mass
from unclipped.attention.patterns import Pattern, fill_heads
from unclipped.attention.scoring import BlockScores, needed
from unclipped.core.errors import UsageError


@dataclass(frozen=True)
class Ruler(Pattern):
    """As many blocks as `of` chooses for each query block and key head."""

    smallest: ClassVar[dict[str, float]] = {"seed": 0}
    of: Pattern
    choose: Literal["oracle", "random"]
    seed: int = 0
    """Of random: every layer draws anew."""

    @property
    def is_dynamic(self) -> bool:
        return True

    @property
    def leaves_no_row_empty(self) -> bool:
        return True  # a query block's own span is always attended to

    def inner(self) -> tuple[Pattern, ...]:
        return (self.of,)

    def for_layer(self, layer: int) -> Pattern:
        return replace(self, of=self.of.for_layer(layer), seed=self.seed * 1009 + layer)

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        known = needed(scores, f"{self.choose} ruler")
        free = known.candidates.cpu().numpy()  # (nbq, nbk)
        inner = fill_heads(self.of.touches(query, key, scores), known.key.shape[0])
        counts = (np.broadcast_to(inner, (known.key.shape[0], *free.shape)) & free).sum(axis=-1)  # (Hkv, nbq)
        if self.choose == "oracle":
            if known.offset or known.query.shape[1] != known.key.shape[1]:
                raise UsageError("ruler: measured on whole prompts only; prefill without chunks")
            mass = block_mass(
                known.query,
                known.key,
                query.layout,
                scale=known.scale,
                key_block=key.size,
                query_block=query.size,
            )
            order = mass.grouped(known.key.shape[0])
        else:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.rand(*counts.shape, key.count, generator=generator).numpy()
            order[:, :, 0] = 2.0  # block 0 is always among the chosen
        rank = np.argsort(np.argsort(np.where(free, -order, np.inf), axis=-1, kind="stable"), axis=-1)
        return (rank < counts[..., None]) & free

    def __str__(self) -> str:
        return f"{self.choose} blocks at the density of {self.of}"
