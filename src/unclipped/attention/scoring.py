"""Dynamic patterns: key blocks chosen for each query block from estimates of the attention between them.

Scores are shared by the query heads of a group, because their blocks are gathered once for all of them. What lies on
the diagonal is always attended and competes for no place; block 0 is always among the chosen (attention sinks).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.blocks import Blocks
from unclipped.attention.patterns import Pattern
from unclipped.core.errors import UsageError

_POOLED_BYTES = 1 << 21  # of a portion of states in float32, while they are pooled on a CPU
_FOLDED_BYTES = 1 << 21  # of a portion of antidiagonal scores, which are quadratic


class BlockScores:
    """Estimates of attention between blocks, for one row: query (H, M, d) from token `offset` on, key (Hkv, N, d).

    candidates (query blocks, key blocks): which may be chosen at all; a query block's own span is not among them.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        query_blocks: Blocks,
        key_blocks: Blocks,
        scale: float,
        candidates: np.ndarray,
        offset: int = 0,
    ) -> None:
        self.query, self.key, self.scale, self.offset = query, key, scale, offset
        self.query_blocks, self.key_blocks = query_blocks, key_blocks
        self.group = query.shape[0] // key.shape[0]
        self.candidates = torch.from_numpy(candidates).to(query.device)  # (nbq, nbk)
        reach = np.minimum(query_blocks.layout.reach, key.shape[1] - 1)
        self.reach = torch.from_numpy(reach).to(query.device)  # (tokens of the row,): last key that each may see
        self.begin = torch.from_numpy(query_blocks.layout.begin).to(query.device)  # (tokens of the row,): the first
        self.lacking = offset - int(query_blocks.first[0])
        """Tokens of the first query block that stand before the first query."""

    def pooled(self) -> Tensor:
        """Softmax over the candidates of mean(q)·mean(k), float32 (Hkv, nbq, nbk); rows without any are zero."""
        heads, _, width = self.key.shape
        query = block_means(self.query, self.query_blocks.size, self.lacking)  # (H, nbq, d)
        query = query.view(heads, self.group, -1, width).mean(dim=1)  # (Hkv, nbq, d)
        key = block_means(self.key, self.key_blocks.size)  # (Hkv, nbk, d)
        return self._normalise((query @ key.transpose(1, 2)).mul_(self.scale))

    def antidiagonal(self, stride: int) -> Tensor:
        """Attention summed along strided antidiagonals inside each block, as XAttention estimates it: (Hkv, nbq, nbk).

        `stride` tokens are folded into the features, the queries in reverse, so that one product of folded vectors
        sums an antidiagonal of stride × stride scores. Costs 1/stride of QKᵀ.
        """
        for blocks in (self.query_blocks, self.key_blocks):
            if blocks.size % stride:
                raise UsageError(f"stride {stride} does not divide the block of {blocks.size} tokens")
        length = self.key.shape[1]
        padding = -length % stride
        query = F.pad(self.query, (0, 0, self.lacking, padding))
        key = F.pad(self.key, (0, 0, 0, padding))
        folded_query = query.unflatten(1, (-1, stride)).flip(2).flatten(2)  # (H, query folds, stride·d)
        folded_key = key.unflatten(1, (-1, stride)).flatten(2)  # (Hkv, folds, stride·d)
        first = int(self.query_blocks.first[0]) // stride
        own_folds = slice(first, first + folded_query.shape[1])
        reach = F.pad(self.reach[:length], (0, padding), value=length - 1).unflatten(0, (-1, stride)).amax(dim=1)
        reach = reach[own_folds] // stride  # (query folds,): last fold that each may see
        begin = self.begin[:length:stride][own_folds] // stride  # (query folds,): the first
        folds = torch.arange(folded_key.shape[1], device=query.device)
        folds_of_block = self.key_blocks.size // stride
        portion = max(1, _FOLDED_BYTES // (4 * self.group * folded_key.shape[1]))
        result = []
        for head in range(key.shape[0]):
            own = folded_query[head * self.group : (head + 1) * self.group]  # (G, query folds, stride·d)
            masses = []
            for part, seen, since in zip(
                own.split(portion, dim=1), reach.split(portion), begin.split(portion), strict=True
            ):
                # What no query of the portion sees is not computed.
                skipped = int(since.min()) // folds_of_block  # blocks
                span = slice(skipped * folds_of_block, int(seen.max()) + 1)
                near = folds[span]
                scores = (part @ folded_key[head, span].T).float().mul_(self.scale / stride)  # (G, portion, near)
                hidden = (near[None, :] > seen[:, None]) | (near[None, :] < since[:, None])
                mass = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1).sum(dim=0)
                mass = block_sums(mass, folds_of_block)  # (portion, near blocks)
                masses.append(F.pad(mass, (skipped, self.key_blocks.count - skipped - mass.shape[1])))  # (portion, nbk)
            mass = torch.cat(masses)  # (query folds, nbk)
            mass[: self.lacking // stride] = 0.0
            result.append(block_sums(mass.T, self.query_blocks.size // stride).T)  # (nbq, nbk)
        mass = torch.stack(result) * self.candidates  # (Hkv, nbq, nbk)
        return mass / mass.sum(dim=-1, keepdim=True).clamp(min=1e-20)

    def probed(self, probes: int) -> tuple[Tensor, Tensor]:
        """Attention of the last `probes` queries of each segment, mean over the group and summed over the probes:
        on each key block, and at each distance in blocks behind the probe (what lies after it counts as distance 0),
        float32 (Hkv, nbk) each."""
        heads, length, size = self.key.shape[0], self.key.shape[1], self.key_blocks.size
        column, slash = (self.query.new_zeros(heads, self.key_blocks.count, dtype=torch.float32) for _ in range(2))
        for positions in self.probe_positions(probes):
            query = self.query[:, positions - self.offset].unflatten(0, (heads, self.group))  # (Hkv, G, P, d)
            near = min(length, int(self.reach[positions].max()) + 1)  # what no probe sees is not computed
            places = torch.arange(near, device=positions.device)
            hidden = (places > self.reach[positions, None]) | (places < self.begin[positions, None])  # (P, near)
            # Up to an edge keys are at least so many blocks behind: running sums there differ by what lies between.
            behind = torch.arange(1, self.key_blocks.count + 1, device=positions.device) * size
            edges = F.pad((positions[:, None] + 1 - behind).clamp(min=0), (1, 0), value=near)  # (P, nbk + 1)
            for head in range(heads):  # one head's scores stay in the cache
                scores = (query[head] @ self.key[head, :near].T).float().mul_(self.scale)  # (G, P, near)
                attention = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1).mean(dim=0)  # (P, near)
                blocks = block_sums(attention.sum(dim=0)[None], size)[0]
                column[head, : len(blocks)] += blocks
                running = F.pad(attention.cumsum(dim=1), (1, 0)).gather(1, edges)  # (P, nbk + 1)
                slash[head] -= running.diff(dim=1).sum(dim=0)
        return column, slash

    def probe_positions(self, probes: int) -> list[Tensor]:
        """Positions of the probe queries of each segment that has any here."""
        length = self.key.shape[1]
        places: list[Tensor] = []
        for segment in self.query_blocks.layout.segments:
            stop = min(segment.start + segment.length, length)
            start = max(segment.start, self.offset, stop - probes)
            if start < stop:
                places.append(torch.arange(start, stop, device=self.query.device))
        return places

    def _normalise(self, scores: Tensor) -> Tensor:
        scores = scores.float().masked_fill_(~self.candidates, float("-inf"))
        return torch.nan_to_num_(scores.softmax(dim=-1), nan=0.0)


def block_means(states: Tensor, size: int, lacking: int = 0) -> Tensor:
    """(heads, N, d) → means of blocks of `size` tokens, (heads, blocks, d), in float32 or as the states are float64;
    the last over the tokens that it has, and the first without the `lacking` ones before it."""
    exact = torch.float64 if states.dtype == torch.float64 else torch.float32
    if lacking:
        first = states[:, : size - lacking].mean(dim=1, keepdim=True, dtype=exact)
        rest = states[:, size - lacking :]
        return torch.cat([first, block_means(rest, size)], dim=1) if rest.shape[1] else first
    whole = states.shape[1] // size * size
    blocks = states[:, :whole].unflatten(1, (-1, size))  # (heads, blocks, size, d)
    portion = max(1, blocks.shape[1])
    if states.device.type == "cpu":  # sums of half precision go through a copy in float32: one that stays in the cache
        portion = max(1, _POOLED_BYTES // (states.shape[0] * size * states.shape[2] * exact.itemsize))
    means = [part.mean(dim=2, dtype=exact) for part in blocks.split(portion, dim=1)]
    if whole < states.shape[1]:
        means.append(states[:, whole:].mean(dim=1, keepdim=True, dtype=exact))
    return torch.cat(means, dim=1)


def block_sums(values: Tensor, size: int) -> Tensor:
    """(rows, columns) → sums over runs of `size` columns, the last shorter: (rows, blocks)."""
    return F.pad(values, (0, -values.shape[1] % size)).unflatten(1, (-1, size)).sum(dim=2)


def chosen(places: Tensor, scores: BlockScores) -> np.ndarray:
    """bool tensor (Hkv, nbq, nbk) → array, limited to the candidates and with block 0."""
    places = places & scores.candidates
    places[:, :, 0] = True
    return places.cpu().numpy()


def needed(scores: BlockScores | None, name: str) -> BlockScores:
    """`scores`; raises UsageError when a plan was asked for without the states that pattern `name` chooses from."""
    if scores is None:
        raise UsageError(f"pattern {name} chooses blocks from queries and keys; plan it with both")
    return scores


@dataclass(frozen=True)
class Dynamic(Pattern):
    """Base of patterns that need scores."""

    @property
    def is_dynamic(self) -> bool:
        return True

    @property
    def leaves_no_row_empty(self) -> bool:
        return True  # block 0 is always among the chosen

    def _estimate(self, scores: BlockScores, stride: int) -> Tensor:
        return scores.antidiagonal(stride) if stride else scores.pooled()


@dataclass(frozen=True)
class TopKBlocks(Dynamic):
    """The `k` key blocks of highest estimated attention. stride: 0 estimates from block means, else antidiagonals."""

    name = "topk"
    smallest = {"stride": 0}  # noqa: RUF012
    k: int
    stride: int = 0

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        known = needed(scores, self.name)
        estimate = self._estimate(known, self.stride).masked_fill(~known.candidates, -1.0)
        best = estimate.topk(min(self.k, key.count), dim=-1).indices  # (Hkv, nbq, k)
        return chosen(torch.zeros_like(estimate, dtype=torch.bool).scatter_(-1, best, value=True), known)


@dataclass(frozen=True)
class MassBlocks(Dynamic):
    """The fewest key blocks whose estimated attention adds up to `mass`; at least `least`, at most `most` (0: all)."""

    name = "mass"
    smallest = {"mass": 0.0, "least": 0, "most": 0, "stride": 0}  # noqa: RUF012
    mass: float
    least: int = 1
    most: int = 0
    stride: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mass <= 1.0:
            raise UsageError(f"pattern mass: mass must be above 0 and at most 1, found {self.mass:g}")
        if self.most and self.most < self.least:
            raise UsageError(f"pattern mass: most ({self.most}) is below least ({self.least})")

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        known = needed(scores, self.name)
        estimate = self._estimate(known, self.stride)  # (Hkv, nbq, nbk)
        ordered, order = estimate.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the better blocks
        rank = torch.arange(key.count, device=order.device)
        wanted = (before < self.mass) & (ordered > 0) | (rank < self.least)
        if self.most:
            wanted &= rank < self.most
        return chosen(torch.zeros_like(wanted).scatter_(-1, order, wanted), known)


@dataclass(frozen=True)
class VerticalSlash(Dynamic):
    """Key blocks and block diagonals that probe queries attend to most (MInference's vertical-slash, on blocks).

    Each key head has its own, from its group's mean. Diagonals reach back only: later tokens, where they may be seen,
    are chosen as columns.

    Probes are the last `probes` queries of *each* segment: those of the prompt alone are text and say nothing of what
    one part of an image needs of another.
    """

    name = "vertical_slash"
    smallest = {"columns": 0, "slashes": 0}  # noqa: RUF012
    columns: int
    slashes: int
    probes: int = 64

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        known = needed(scores, self.name)
        column, slash = known.probed(self.probes)  # (Hkv, nbk)
        length, device = known.key.shape[1], slash.device
        keep = torch.zeros(slash.shape[0], query.count, key.count, dtype=torch.bool, device=device)
        if self.columns:
            best = column.topk(min(self.columns, key.count), dim=-1).indices
            keep |= torch.zeros_like(column, dtype=torch.bool).scatter_(1, best, value=True)[:, None]
        if self.slashes:
            best = slash.topk(min(self.slashes, key.count), dim=-1).indices
            near = torch.zeros_like(slash, dtype=torch.bool).scatter_(1, best, value=True)  # (Hkv, distance)
            total = F.pad(near.cumsum(dim=1), (1, 0))  # (Hkv, distance + 1): chosen distances below
            first, last = (torch.from_numpy(bound).to(device)[:, None] for bound in (query.first, query.last))
            begin = torch.arange(key.count, device=device) * key.size
            end = (begin + key.size).clamp(max=length)
            low = ((first - end + 1) // key.size).clamp(min=0)  # (nbq, nbk): the distances between two blocks
            high = ((last - begin) // key.size).clamp(min=-1, max=key.count - 1)
            keep |= total[:, high + 1] > total[:, torch.minimum(low, high + 1)]
        return chosen(keep, known)


@dataclass(frozen=True)
class RandomBlocks(Dynamic):
    """`k` key blocks at random: the ruler that a selection has to beat at equal density."""

    name = "random"
    smallest = {"seed": 0}  # noqa: RUF012
    k: int
    seed: int = 0

    def touches(self, query: Blocks, key: Blocks, scores: BlockScores | None = None) -> np.ndarray:
        known = needed(scores, self.name)
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.rand(known.key.shape[0], query.count, key.count, generator=generator).to(known.key.device)
        values = values.masked_fill(~known.candidates, -1.0)
        best = values.topk(min(self.k, key.count), dim=-1).indices
        return chosen(torch.zeros_like(values, dtype=torch.bool).scatter_(-1, best, value=True), known)
