"""Where attention goes: its true mass between blocks, by modality, and what of it a plan keeps.

Quadratic in the tokens of a row, a block of queries at a time: for measuring, not for running. Recovered mass is
ρ = mean over queries of the attention that falls on attended keys (reference: MInference, SeerAttention report it so).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unclipped.attention.blocks import Blocks
from unclipped.attention.layout import Layout
from unclipped.attention.plan import BlockPlan

PAIRS = ("text->text", "text->image", "image->text", "image->image")
"""Modality of the query and of the key, in the order of the last axis of all measures here."""


@dataclass(frozen=True, eq=False)
class BlockMass:
    """Attention of one layer between blocks, summed over queries; queries of a row, all of its tokens."""

    values: np.ndarray
    """float32 (H, query blocks, key blocks, 4): modality pairs as in `PAIRS`. Sums over keys and pairs to queries."""
    visible: np.ndarray
    """Pairs of tokens that a query may see, int64 (query blocks, key blocks)."""
    queries: int
    dense_pairs: int
    """Pairs that dense attention forms without a sliding window: what densities are shares of, as those of plans."""

    @property
    def by_pair(self) -> np.ndarray:
        """Share of all attention in each modality pair, (H, 4); sums to 1."""
        return self.values.sum(axis=(1, 2)) / self.queries

    def grouped(self, key_heads: int) -> np.ndarray:
        """Mean over the query heads of each key head and sum over modalities: (Hkv, query blocks, key blocks)."""
        return self.values.sum(axis=-1).reshape(key_heads, -1, *self.visible.shape).mean(axis=1)

    def kept(self, chosen: np.ndarray) -> np.ndarray:
        """Share of all attention that falls on chosen blocks (Hkv or 1, query blocks, key blocks), (H, 4)."""
        heads = self.values.shape[0]
        spread = np.repeat(chosen, heads // len(chosen), axis=0)  # (H, nbq, nbk)
        return np.einsum("hqkp,hqk->hp", self.values, spread.astype(np.float32)) / self.queries

    def density(self, chosen: np.ndarray) -> np.ndarray:
        """Chosen pairs over those of dense attention for each key head (or 1), (Hkv,)."""
        return (chosen * self.visible).sum(axis=(1, 2)) / self.dense_pairs


@torch.no_grad()
def block_mass(
    query: Tensor, key: Tensor, layout: Layout, *, scale: float, key_block: int = 128, query_block: int = 256
) -> BlockMass:
    """True attention of a whole row: query (H, N, d) and key (Hkv, N, d), softmax in float32 (or float64 as given)."""
    heads, length, _ = query.shape
    key_heads = key.shape[0]
    rows, columns = Blocks(layout, query_block), Blocks(layout, key_block)
    begin, reach = (torch.from_numpy(bound).to(query.device) for bound in (layout.begin, layout.reach))  # (N,) each
    visual = torch.from_numpy(layout.is_visual).to(query.device)
    exact = torch.promote_types(query.dtype, torch.float32)
    kinds = torch.stack([~visual, visual]).to(exact)  # (2, N): text, image
    padding = columns.count * key_block - length
    key_kinds = torch.nn.functional.pad(kinds, (0, padding)).unflatten(1, (columns.count, key_block))  # (2, nbk, kb)
    positions = torch.arange(length, device=query.device)
    values = np.zeros((heads, rows.count, columns.count, 4), dtype=np.float32)
    visible = np.zeros((rows.count, columns.count), dtype=np.int64)
    group = heads // key_heads
    for block in range(rows.count):
        span = slice(int(rows.first[block]), int(rows.last[block]) + 1)
        hidden = (positions > reach[span][:, None]) | (positions < begin[span][:, None])  # (queries, N)
        seen = torch.nn.functional.pad(~hidden, (0, padding)).sum(dim=0).unflatten(0, (columns.count, key_block))
        visible[block] = seen.sum(dim=1).cpu().numpy()
        for head in range(key_heads):
            own = query[head * group : (head + 1) * group, span].to(exact)  # (G, queries, d)
            scores = (own @ key[head].to(exact).T).mul_(scale).masked_fill_(hidden, float("-inf"))
            by_kind = kinds[:, span] @ scores.softmax(dim=-1)  # (G, 2, N): summed over text and over image queries
            spread = torch.nn.functional.pad(by_kind, (0, padding)).unflatten(2, (columns.count, key_block))
            summed = torch.einsum("gqbk,cbk->gbqc", spread, key_kinds)  # (G, nbk, 2, 2)
            values[head * group : (head + 1) * group, block] = summed.flatten(2).cpu().numpy()
    return BlockMass(values, visible, length, int((layout.reach + 1).sum()))


def attended_blocks(plan: BlockPlan) -> np.ndarray:
    """Which key blocks a plan attends to, whole or behind its mask: bool (heads, query blocks, key blocks)."""
    columns = -(-plan.length // plan.key_block)
    chosen = np.zeros((plan.lists.shape[0], plan.blocks, columns + 1), dtype=bool)
    for lists in (plan.lists, plan.partial):
        np.put_along_axis(chosen, lists.cpu().numpy() % (columns + 1), True, axis=2)  # -1 falls on the last, unused
    chosen = chosen[:, :, :columns]
    return chosen | own_blocks(plan)[None] & plan.is_diagonal.cpu().numpy()[None, :, None]


def own_blocks(plan: BlockPlan) -> np.ndarray:
    """Key blocks of each query block's own span, which is always attended to: bool (query blocks, key blocks)."""
    rows = np.arange(plan.blocks) + plan.first_block
    columns = np.arange(-(-plan.length // plan.key_block)) * plan.key_block // plan.query_block
    return rows[:, None] == columns[None, :]


@dataclass(frozen=True)
class Kept:
    """What one pattern keeps of a layer's attention in one row, beside both rulers at equal density."""

    density: np.ndarray
    """Attended pairs over those of dense attention, (Hkv,)."""
    pattern: np.ndarray
    """Share of all attention kept in each modality pair, (H, 4)."""
    oracle: np.ndarray
    """The same for as many blocks a query block, chosen by true mass (mean over the group): no choice keeps more."""
    random: np.ndarray
    """The expectation for as many blocks chosen at random, block 0 among them."""


def kept_mass(mass: BlockMass, plan: BlockPlan, key_heads: int) -> Kept:
    """Compare a plan's choice with the best and with a random one of as many blocks for every query block."""
    chosen = np.broadcast_to(attended_blocks(plan), (key_heads, *mass.visible.shape))
    own = own_blocks(plan)
    free = (mass.visible > 0) & ~own  # (nbq, nbk): blocks that are a matter of choice
    counts = (chosen & free).sum(axis=-1)  # (Hkv, nbq)
    truth = np.where(free, mass.grouped(key_heads), -1.0)  # (Hkv, nbq, nbk)
    rank = np.argsort(np.argsort(-truth, axis=-1, kind="stable"), axis=-1)
    best = (rank < counts[..., None]) & free | own
    return Kept(
        mass.density(chosen),
        mass.kept(chosen),
        mass.kept(best),
        mass.kept(random_shares(free, counts) + own),
    )


def random_shares(free: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Probability of each free block (nbq, nbk) to be chosen when `counts` (heads, nbq) are, block 0 for certain."""
    others = free.copy()
    others[:, 0] = False
    places = np.maximum(others.sum(axis=-1), 1)  # (nbq,)
    left = counts - (free[:, 0] & (counts > 0))  # (heads, nbq)
    shares = others[None] * np.minimum(left / places, 1.0)[..., None]
    shares[:, :, 0] = free[:, 0] & (counts > 0)
    return shares
