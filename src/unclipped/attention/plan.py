"""Block plans: for every block of queries the key blocks that it attends to, whole or behind a mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from unclipped.attention.blocks import Blocks, overlap
from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Pattern, fill_heads
from unclipped.attention.scoring import BlockScores
from unclipped.core.errors import UsageError

_ROWS_AT_ONCE = 128


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Attention by blocks of queries [offset, length) to keys [0, length); blocks are counted from token 0.

    A query may see the keys from its `begin`, which is 0 but in layers with a sliding window, up to its `reach`:
    itself, where attention is causal, or the end of its image. A query block of `query_block` tokens attends whole to
    the key blocks (of `key_block` tokens) of its list, all of which all its queries may see. Its own span it attends to
    always: on a causal diagonal, or, where `is_diagonal` is false, by blocks that stand in the list or among `partial`
    ones, which are attended to behind the mask `begin ≤ key ≤ reach`. No row is ever empty, because each sees itself.
    """

    length: int
    query_block: int
    key_block: int
    lists: Tensor
    """Key blocks, int64 (heads, query blocks, longest), ascending, filled up with -1; heads is Hkv, or 1 for all."""
    counts: Tensor
    """Length of each list, int64 (heads, query blocks)."""
    partial: Tensor
    """Key blocks behind the mask, as `lists`."""
    partial_counts: Tensor
    is_diagonal: Tensor
    """Whether a query block's own span is plainly causal, bool (query blocks,)."""
    reach: Tensor
    """Last key that each query may see, int64 (length - offset,)."""
    begin: Tensor
    """First key that each query may see, int64 (length - offset,)."""
    offset: int = 0

    @property
    def first_block(self) -> int:
        """Number of the first query block."""
        return self.offset // self.query_block

    @property
    def blocks(self) -> int:
        """Query blocks."""
        return len(self.is_diagonal)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Queries of each query block, (query blocks,); the first and the last may have fewer."""
        starts = (np.arange(self.blocks) + self.first_block) * self.query_block
        return np.minimum(starts + self.query_block, self.length) - np.maximum(starts, self.offset)

    @cached_property
    def density(self) -> float:
        """Attended pairs over those of dense attention, mean over heads. Dense attention of a layer with a window
        counts as that without one: its mask leaves keys out after their scores are formed."""
        reach, begin = self.reach.cpu().numpy(), self.begin.cpu().numpy()
        diagonal = self.is_diagonal.cpu().numpy()
        own = float((self.sizes * (self.sizes + 1) // 2)[diagonal].sum())
        listed = float((self.counts.double().mean(dim=0).cpu().numpy() * self.sizes).sum()) * self.key_block
        masked = 0
        heads, rows, places = np.nonzero(self.partial.cpu().numpy() >= 0)
        starts = np.maximum((rows + self.first_block) * self.query_block, self.offset) - self.offset
        for start, size, block in zip(
            starts, self.sizes[rows], self.partial.cpu().numpy()[heads, rows, places], strict=True
        ):
            first, span = block * self.key_block, slice(start, start + size)
            stop = np.minimum(reach[span] + 1, first + self.key_block)
            masked += int(np.maximum(stop - np.maximum(begin[span], first), 0).sum())
        return (own + listed + masked / self.partial.shape[0]) / float((reach + 1).sum())

    def element_mask(self) -> Tensor:
        """What the plan attends to, token by token: bool (heads, queries, keys). For tests: it is quadratic."""
        query, key = torch.arange(self.offset, self.length), torch.arange(self.length)
        rows = query // self.query_block - self.first_block
        seen = (key[None, :] <= self.reach.cpu()[:, None]) & (key[None, :] >= self.begin.cpu()[:, None])
        own = seen & (query[:, None] // self.query_block == key[None, :] // self.query_block)
        blocks = -(-self.length // self.key_block) + 1
        parts = []
        for lists in (self.lists.cpu(), self.partial.cpu()):
            allowed = torch.zeros(*lists.shape[:2], blocks, dtype=torch.bool)
            allowed.scatter_(2, lists % blocks, value=True)  # -1 falls on the last, unused column
            parts.append(allowed[:, rows][:, :, key // self.key_block])  # (heads, queries, keys)
        diagonal = own & self.is_diagonal.cpu()[rows][:, None]
        return parts[0] | (parts[1] & seen) | diagonal


def build_plan(
    pattern: Pattern,
    layout: Layout,
    *,
    key_block: int = 128,
    query_block: int = 256,
    query: Tensor | None = None,
    key: Tensor | None = None,
    scale: float | None = None,
    key_heads: int | None = None,
    offset: int = 0,
    stop: int | None = None,
) -> BlockPlan:
    """The plan of one row, or of a chunk of it: queries [offset, stop) and keys [0, stop), stop by default its length.

    Dynamic patterns need query (H, stop - offset, d) and key (Hkv, stop, d). query_block is a multiple of key_block:
    several blocks of queries share a list, which keeps matrix products large. key_heads: of the model, for patterns
    that differ from head to head; by default those of `key`. A static pattern gives a chunk the keys that it gives
    the same queries in the whole row. Raises UsageError when blocks do not divide, a row has no key to see, or queries
    and keys are missing or of another length.
    """
    if key_block < 1 or query_block < key_block or query_block % key_block:
        raise UsageError(
            f"blocks: query_block ({query_block}) must be a multiple of key_block ({key_block}), both at least 1"
        )
    stop = layout.length if stop is None else stop
    if not 0 <= offset < stop <= layout.length:
        raise UsageError(f"plan: expected 0 ≤ offset < stop ≤ {layout.length} tokens, found {offset} and {stop}")
    refuse_empty_rows(pattern, layout, offset, stop)
    rows = Blocks(layout, query_block, offset // query_block, -(-stop // query_block))
    columns = Blocks(layout, key_block, 0, -(-stop // key_block))
    sight = _sight(rows, columns, offset, stop)
    scores = None
    if pattern.is_dynamic:
        if query is None or key is None:
            raise UsageError(f"pattern {pattern} chooses blocks from queries and keys; give both")
        for name, states, tokens in (("queries", query, stop - offset), ("keys", key, stop)):
            if states.shape[1] != tokens:
                raise UsageError(f"plan: the layout has {tokens} tokens, the {name} {states.shape[1]}")
        factor = scale if scale is not None else float(query.shape[-1]) ** -0.5
        candidates = sight.whole | sight.partial
        scores = BlockScores(query.detach(), key.detach(), rows, columns, factor, candidates, offset)
    touched = pattern.touches(rows, columns, scores)  # (heads or 1, nbq, nbk)
    heads = key_heads if key_heads is not None else key.shape[0] if key is not None else None
    if heads is not None:
        touched = fill_heads(touched, heads)
    device = key.device if key is not None else None
    return _assemble(touched, sight, rows, columns, offset, stop, device)


@dataclass(frozen=True)
class _BlockSight:
    """What the layout's sight and window let query blocks see of key blocks, bool (query blocks, key blocks).

    own: blocks of the query block's own span, which are in neither of the others. whole: each query may see each key.
    partial: some query may see some key.
    """

    own: np.ndarray
    whole: np.ndarray
    partial: np.ndarray
    is_diagonal: np.ndarray
    """The own span is plainly causal, (query blocks,)."""
    own_is_whole: np.ndarray
    """Every query may see every key of the own span, (query blocks,)."""


def _sight(rows: Blocks, columns: Blocks, offset: int, stop: int) -> _BlockSight:
    sight = _sight_of_later(rows, columns, offset, stop)
    if not rows.layout.window:
        return sight
    begin = rows.layout.begin  # never decreasing
    inside = columns.first[None, :] >= begin[rows.last][:, None]  # each query sees the block's first key
    touched = columns.last[None, :] >= begin[np.maximum(rows.first, offset)][:, None]  # some query sees its last key
    partial = touched & (sight.partial | (sight.whole & ~inside))
    is_own_inside = begin[rows.last] <= rows.first  # (query blocks,)
    return _BlockSight(
        sight.own,
        sight.whole & inside,
        partial,
        # What stands behind the mask needs the own span there too, else a row of that part could be empty.
        sight.is_diagonal & is_own_inside & ~partial.any(axis=1),
        sight.own_is_whole & is_own_inside,
    )


def _sight_of_later(rows: Blocks, columns: Blocks, offset: int, stop: int) -> _BlockSight:
    """What the rule for later tokens alone lets them see."""
    layout = rows.layout
    own = rows.first[:, None] // rows.size == columns.first[None, :] // rows.size
    earlier = columns.last[None, :] < rows.first[:, None]
    later = columns.first[None, :] > rows.last[:, None]
    ends_inside = columns.first + columns.size > stop  # a shorter block stands behind the mask
    begins_whole = rows.first >= offset
    if layout.sight == "causal":
        none = np.zeros_like(own)
        return _BlockSight(own, earlier, none, begins_whole, np.zeros(rows.count, dtype=bool))
    if layout.sight == "all":
        everything = ~own
        cut = ends_inside[None, :]
        whole_own = ~(own & cut).any(axis=1)
        return _BlockSight(own, everything & ~cut, everything & cut, np.zeros_like(begins_whole), whole_own)
    both = rows.has_visual[:, None] & columns.has_visual[None, :]
    shares = both & overlap(rows.image, columns.image)
    single_row = ~rows.has_text & (rows.image[0] == rows.image[1])
    single_column = ~columns.has_text & (columns.image[0] == columns.image[1])
    pure = shares & single_row[:, None] & single_column[None, :] & ~ends_inside[None, :]
    whole_own = ~(own & ~pure).any(axis=1)
    return _BlockSight(
        own, earlier | (later & pure), later & shares & ~pure, begins_whole & ~rows.has_visual, whole_own
    )


def _assemble(
    touched: np.ndarray,
    sight: _BlockSight,
    rows: Blocks,
    columns: Blocks,
    offset: int,
    stop: int,
    device: torch.device | None,
) -> BlockPlan:
    """Lists from touched blocks (heads, nbq, nbk). Where anything stands behind the mask the own span does too, so that
    no row of that part is empty: each sees itself."""
    partial = touched & sight.partial
    masks_own = ~sight.is_diagonal & (~sight.own_is_whole | partial.any(axis=-1))  # (heads, nbq)
    lists_own = ~sight.is_diagonal & ~masks_own
    whole = (touched & sight.whole) | (sight.own & lists_own[..., None])
    partial = partial | (sight.own & masks_own[..., None])
    reach, begin = np.minimum(rows.layout.reach[offset:stop], stop - 1), rows.layout.begin[offset:stop]
    lists, counts = _listed(whole)
    partial_lists, partial_counts = _listed(partial)
    return BlockPlan(
        stop,
        rows.size,
        columns.size,
        *(
            torch.from_numpy(values).to(device)
            for values in (lists, counts, partial_lists, partial_counts, sight.is_diagonal, reach, begin)
        ),
        offset=offset,
    )


def _listed(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool (heads, nbq, nbk) → the chosen blocks, ascending, filled up with -1, and their counts, int64."""
    counts = chosen.sum(axis=-1)  # (heads, nbq)
    lists = np.full((*counts.shape, max(1, int(counts.max()))), -1, dtype=np.int64)
    heads, rows, blocks = np.nonzero(chosen)  # ordered by head, row and block
    before = np.cumsum(counts).reshape(counts.shape) - counts  # listed ahead of each row
    lists[heads, rows, np.arange(len(blocks)) - before[heads, rows]] = blocks
    return lists, counts.astype(np.int64)


def refuse_empty_rows(pattern: Pattern, layout: Layout, offset: int = 0, stop: int | None = None) -> None:
    """Raise UsageError that names the first row to which a static pattern leaves no key that it may see.

    A layer's sliding window does not count: a row always sees the keys of its own block of queries.
    """
    stop = layout.length if stop is None else stop
    if pattern.leaves_no_row_empty or pattern.is_dynamic:
        return
    reach = layout.reach
    open_rows: list[np.ndarray] = []
    for start in range(offset, stop, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, stop))
        near = (pattern.element(layout, rows, rows) & (rows[None, :] <= reach[rows][:, None])).any(axis=-1)
        open_rows.append(rows[~np.atleast_2d(near).all(axis=0)])
    left = np.concatenate(open_rows)
    everything = np.arange(stop)
    for start in range(0, len(left), _ROWS_AT_ONCE):
        rows = left[start : start + _ROWS_AT_ONCE]
        seen = (pattern.element(layout, rows, everything) & (everything[None, :] <= reach[rows][:, None])).any(axis=-1)
        empty = rows[~np.atleast_2d(seen).all(axis=0)]
        if len(empty):
            kind = "visual" if layout.is_visual[empty[0]] else "text"
            raise UsageError(
                f"pattern {pattern}: row {int(empty[0])} ({kind}) has no key that it may see; add sink(1) or window(1)"
            )
