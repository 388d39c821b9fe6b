"""Block plans: for every block of queries the list of key blocks that it attends to, and when dense is the better."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from unclipped.attention.blocks import Blocks
from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Pattern
from unclipped.attention.scoring import BlockScores
from unclipped.core.errors import UsageError

SHORTEST = 4096
"""Tokens below which `fallback="auto"` runs dense; at this length sparse pays on a CPU (benchmarks/RESULTS.md)."""
DENSEST = 0.5
"""Density above which `fallback="auto"` runs dense."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Causal attention by blocks: N tokens, the same for queries and keys.

    A query block of `query_block` tokens attends causally to the keys of its own span, always, and in full to the
    earlier key blocks (of `key_block` tokens) that `lists` names. No row is ever empty, because each sees itself.
    """

    length: int
    query_block: int
    key_block: int
    lists: Tensor
    """Key blocks, int64 (heads, query blocks, longest), ascending, filled up with -1; heads is Hkv, or 1 for all."""
    counts: Tensor
    """Length of each list, int64 (heads, query blocks)."""

    @cached_property
    def density(self) -> float:
        """Attended pairs over those of dense causal attention, mean over heads."""
        starts = np.arange(0, self.length, self.query_block)
        sizes = np.minimum(self.query_block, self.length - starts)
        own = float((sizes * (sizes + 1) // 2).sum())
        earlier = float((self.counts.double().mean(dim=0).cpu().numpy() * sizes).sum()) * self.key_block
        return (own + earlier) / (self.length * (self.length + 1) / 2)

    @property
    def reason(self) -> str | None:
        """Why dense attention is the better choice, if it is."""
        if self.density > DENSEST:
            return f"density {self.density:.2f} is above {DENSEST}"
        return None

    def element_mask(self) -> Tensor:
        """What the plan attends to, token by token: bool (heads, N, N). For tests and pictures: it is quadratic."""
        position = torch.arange(self.length)
        heads, blocks, _ = self.lists.shape
        allowed = torch.zeros(heads, blocks, -(-self.length // self.key_block) + 1, dtype=torch.bool)
        allowed.scatter_(2, self.lists.cpu() % allowed.shape[2], value=True)  # -1 falls on the last, unused column
        earlier = allowed[:, position // self.query_block][:, :, position // self.key_block]  # (heads, N, N)
        own = position[:, None] // self.query_block == position[None, :] // self.query_block
        return earlier | (own & (position[:, None] >= position[None, :]))


def dense_reason(length: int) -> str | None:
    """Why a prompt runs dense before any plan is made, if it does."""
    if length < SHORTEST:
        return f"{length} tokens are fewer than {SHORTEST}"
    return None


def build_plan(
    pattern: Pattern,
    layout: Layout,
    *,
    key_block: int = 128,
    query_block: int = 256,
    query: Tensor | None = None,
    key: Tensor | None = None,
    scale: float | None = None,
) -> BlockPlan:
    """The plan of one row. Dynamic patterns need query (H, N, d) and key (Hkv, N, d).

    query_block is a multiple of key_block: several blocks of queries share a list, which keeps matrix products large.
    Raises UsageError when blocks do not divide, or queries and keys are missing or of another length.
    """
    if key_block < 1 or query_block < key_block or query_block % key_block:
        raise UsageError(
            f"blocks: query_block ({query_block}) must be a multiple of key_block ({key_block}), both at least 1"
        )
    rows, columns = Blocks(layout, query_block), Blocks(layout, key_block)
    scores = None
    if pattern.is_dynamic:
        if query is None or key is None:
            raise UsageError(f"pattern {pattern} chooses blocks from queries and keys; give both")
        for name, states in (("queries", query), ("keys", key)):
            if states.shape[1] != layout.length:
                raise UsageError(f"plan: the layout has {layout.length} tokens, the {name} {states.shape[1]}")
        factor = scale if scale is not None else float(query.shape[-1]) ** -0.5
        scores = BlockScores(query.detach(), key.detach(), rows, columns, factor)
    touched = pattern.touches(rows, columns, scores)  # (heads or 1, nbq, nbk)
    touched = touched & (columns.last[None, :] < rows.first[:, None])
    counts = touched.sum(axis=-1)  # (heads, nbq)
    longest = max(1, int(counts.max()))
    order = np.argsort(~touched, axis=-1, kind="stable")[..., :longest]  # chosen blocks first, ascending
    lists = np.where(np.arange(longest) < counts[..., None], order, -1)
    device = key.device if key is not None else None
    return BlockPlan(
        layout.length,
        query_block,
        key_block,
        torch.from_numpy(lists.astype(np.int64)).to(device),
        torch.from_numpy(counts.astype(np.int64)).to(device),
    )
