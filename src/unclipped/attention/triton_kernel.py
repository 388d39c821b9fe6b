"""Triton kernels of attention over lists of key blocks. Imported only where Triton is there: see `triton_backend.py`.

Query heads of a group share their lists, so they are folded into the rows of a tile: row r is token r // G, head r % G.
Each kernel runs two loops: over whole blocks, without any mask; then over blocks behind the mask `begin ≤ key ≤ reach`.
The online softmax and its backward follow FlashAttention-2 (Dao, 2023) in base 2. No kernel uses atomics: dK and dV
walk the transposed lists, so gradients are the same at every run.

Lists are `starts` and `blocks` (compressed rows), one row for each key head, or for all (`list_rows` 0), and block.
"""

# No `from __future__ import annotations`: Triton reads annotations, which mark what is known when it compiles.
# ruff: noqa: ANN001, ANN202, ANN201
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)  # finite, so that a tile without a visible key makes no NaN (∞ - ∞)


@triton.jit
def _dot(left, right, total, WIDEN: tl.constexpr):
    """total + left @ right, accumulated in float32. WIDEN: the interpreter has no bfloat16 product."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _tile(base, first, stride, COUNT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """COUNT keys or values from `first` on, all of them there: (COUNT, PADDED)."""
    features = tl.arange(0, PADDED)
    places = base + first.to(tl.int64) * stride + tl.arange(0, COUNT)[:, None] * stride + features[None, :]
    if PADDED == WIDTH:
        return tl.load(places)
    else:  # noqa: RET505 - Triton compiles one branch only when both stand in the `if`
        return tl.load(places, mask=features[None, :] < WIDTH, other=0.0)


@triton.jit
def _cut_tile(base, first, length, stride, COUNT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """As `_tile`, with zeros behind the last of `length` keys."""
    features = tl.arange(0, PADDED)
    keys = first + tl.arange(0, COUNT)
    places = base + keys.to(tl.int64)[:, None] * stride + features[None, :]
    return tl.load(places, mask=(keys < length)[:, None] & (features < WIDTH)[None, :], other=0.0)


@triton.jit
def _rows(block, part, before, length, QUERY_BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a tile, `part` of query block `block`: token among the queries, head in the group, whether it is one."""
    rows = part * ROWS + tl.arange(0, ROWS)
    inside = rows // GROUP
    tokens = block * QUERY_BLOCK - before + inside
    return tokens, rows % GROUP, (tokens >= 0) & (tokens < length) & (inside < QUERY_BLOCK)


@triton.jit
def _states(base, tokens, heads, live, head_stride, token_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Queries, or what has their shape, of a tile's rows: (ROWS, PADDED), zero where a row is none."""
    features = tl.arange(0, PADDED)
    places = base + (heads.to(tl.int64) * head_stride + tokens.to(tl.int64) * token_stride)[:, None] + features[None, :]
    return tl.load(places, mask=live[:, None] & (features < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(base, values, tokens, heads, live, head_stride, token_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    features = tl.arange(0, PADDED)
    places = base + (heads.to(tl.int64) * head_stride + tokens.to(tl.int64) * token_stride)[:, None] + features[None, :]
    mask = live[:, None] & (features < WIDTH)[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _absorb(output, total, peak, scores, values, factor, WIDEN: tl.constexpr):
    """One step of the online softmax: scores (ROWS, COLUMNS) before scaling, values (COLUMNS, PADDED)."""
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, 1)
    output = _dot(weights.to(values.dtype), values, output * shrink[:, None], WIDEN)
    return output, total, higher


@triton.jit
def forward_kernel(
    query, key, value, output, sums, starts, blocks, masked_starts, masked_blocks, begin, reach,
    query_head, query_token, key_head, key_token, value_head, value_token, output_head, output_token,
    queries, keys, before, list_rows, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Output and natural log-sum-exp (H, M) of one tile of one key head's group."""
    PARTS: tl.constexpr = (QUERY_BLOCK * GROUP + ROWS - 1) // ROWS
    SPLIT: tl.constexpr = KEY_BLOCK // COLUMNS
    MASKED_SPLIT: tl.constexpr = KEY_BLOCK // MASKED
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later blocks, whose lists are longer, first
    head = tl.program_id(1)
    block, part = tile // PARTS, tile % PARTS
    tokens, heads, live = _rows(block, part, before, queries, QUERY_BLOCK, GROUP, ROWS)
    heads += head * GROUP
    own = _states(query, tokens, heads, live, query_head, query_token, WIDTH, PADDED)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * value_head
    row = head * list_rows + block
    factor = scale * LOG2E
    result = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    peak = tl.zeros([ROWS], dtype=tl.float32) + LOWEST

    for step in tl.range(tl.load(starts + row) * SPLIT, tl.load(starts + row + 1) * SPLIT):
        first = tl.load(blocks + step // SPLIT) * KEY_BLOCK + (step % SPLIT) * COLUMNS
        other = _tile(key, first, key_token, COLUMNS, WIDTH, PADDED)
        scores = _dot(own, tl.trans(other), tl.zeros([ROWS, COLUMNS], dtype=tl.float32), WIDEN)
        values = _tile(value, first, value_token, COLUMNS, WIDTH, PADDED)
        result, total, peak = _absorb(result, total, peak, scores, values, factor, WIDEN)

    seen = tl.load(reach + tokens, mask=live, other=-1)
    since = tl.load(begin + tokens, mask=live, other=keys)
    furthest, earliest = tl.max(seen, 0), tl.min(since, 0)
    for step in tl.range(tl.load(masked_starts + row) * MASKED_SPLIT, tl.load(masked_starts + row + 1) * MASKED_SPLIT):
        first = tl.load(masked_blocks + step // MASKED_SPLIT) * KEY_BLOCK + (step % MASKED_SPLIT) * MASKED
        if (first <= furthest) & (first + MASKED > earliest):
            other = _cut_tile(key, first, keys, key_token, MASKED, WIDTH, PADDED)
            scores = _dot(own, tl.trans(other), tl.zeros([ROWS, MASKED], dtype=tl.float32), WIDEN)
            columns = (first + tl.arange(0, MASKED))[None, :]
            visible = (columns <= seen[:, None]) & (columns >= since[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            values = _cut_tile(value, first, keys, value_token, MASKED, WIDTH, PADDED)
            result, total, peak = _absorb(result, total, peak, scores, values, factor, WIDEN)

    total = tl.where(total > 0, total, 1.0)  # rows of the tile that are no queries
    _store(output, result / total[:, None], tokens, heads, live, output_head, output_token, WIDTH, PADDED)
    tl.store(sums + heads.to(tl.int64) * queries + tokens, (peak + tl.log2(total)) * LN2, mask=live)


@triton.jit
def delta_kernel(
    output, gradient, delta, output_head, output_token, gradient_head, gradient_token, queries,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = Σ output · gradient over the features, (H, M)."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    heads = tl.zeros([ROWS], dtype=tl.int32) + tl.program_id(1)
    live = tokens < queries
    out = _states(output, tokens, heads, live, output_head, output_token, WIDTH, PADDED).to(tl.float32)
    grad = _states(gradient, tokens, heads, live, gradient_head, gradient_token, WIDTH, PADDED).to(tl.float32)
    tl.store(delta + heads.to(tl.int64) * queries + tokens, tl.sum(out * grad, 1), mask=live)


@triton.jit
def query_gradient_kernel(
    query, key, value, gradient, result, sums, delta, starts, blocks, masked_starts, masked_blocks, begin, reach,
    query_head, query_token, key_head, key_token, value_head, value_token,
    gradient_head, gradient_token, result_head, result_token,
    queries, keys, before, list_rows, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ of one tile, over the lists of the forward."""
    PARTS: tl.constexpr = (QUERY_BLOCK * GROUP + ROWS - 1) // ROWS
    SPLIT: tl.constexpr = KEY_BLOCK // COLUMNS
    MASKED_SPLIT: tl.constexpr = KEY_BLOCK // MASKED
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    block, part = tile // PARTS, tile % PARTS
    tokens, heads, live = _rows(block, part, before, queries, QUERY_BLOCK, GROUP, ROWS)
    heads += head * GROUP
    own = _states(query, tokens, heads, live, query_head, query_token, WIDTH, PADDED)
    grad = _states(gradient, tokens, heads, live, gradient_head, gradient_token, WIDTH, PADDED)
    flat = heads.to(tl.int64) * queries + tokens
    joined = tl.load(sums + flat, mask=live, other=0.0) * LOG2E
    shift = tl.load(delta + flat, mask=live, other=0.0)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * value_head
    row = head * list_rows + block
    factor = scale * LOG2E
    total = tl.zeros([ROWS, PADDED], dtype=tl.float32)

    for step in tl.range(tl.load(starts + row) * SPLIT, tl.load(starts + row + 1) * SPLIT):
        first = tl.load(blocks + step // SPLIT) * KEY_BLOCK + (step % SPLIT) * COLUMNS
        other = _tile(key, first, key_token, COLUMNS, WIDTH, PADDED)
        values = _tile(value, first, value_token, COLUMNS, WIDTH, PADDED)
        scores = _dot(own, tl.trans(other), tl.zeros([ROWS, COLUMNS], dtype=tl.float32), WIDEN)
        weights = tl.exp2(scores * factor - joined[:, None])
        change = _dot(grad, tl.trans(values), tl.zeros([ROWS, COLUMNS], dtype=tl.float32), WIDEN)
        change = weights * (change - shift[:, None])
        total = _dot(change.to(other.dtype), other, total, WIDEN)

    seen = tl.load(reach + tokens, mask=live, other=-1)
    since = tl.load(begin + tokens, mask=live, other=keys)
    furthest, earliest = tl.max(seen, 0), tl.min(since, 0)
    for step in tl.range(tl.load(masked_starts + row) * MASKED_SPLIT, tl.load(masked_starts + row + 1) * MASKED_SPLIT):
        first = tl.load(masked_blocks + step // MASKED_SPLIT) * KEY_BLOCK + (step % MASKED_SPLIT) * MASKED
        if (first <= furthest) & (first + MASKED > earliest):
            other = _cut_tile(key, first, keys, key_token, MASKED, WIDTH, PADDED)
            values = _cut_tile(value, first, keys, value_token, MASKED, WIDTH, PADDED)
            scores = _dot(own, tl.trans(other), tl.zeros([ROWS, MASKED], dtype=tl.float32), WIDEN)
            columns = (first + tl.arange(0, MASKED))[None, :]
            visible = (columns <= seen[:, None]) & (columns >= since[:, None])
            weights = tl.exp2(tl.where(visible, scores * factor - joined[:, None], float("-inf")))
            change = _dot(grad, tl.trans(values), tl.zeros([ROWS, MASKED], dtype=tl.float32), WIDEN)
            change = weights * (change - shift[:, None])
            total = _dot(change.to(other.dtype), other, total, WIDEN)

    _store(result, total * scale, tokens, heads, live, result_head, result_token, WIDTH, PADDED)


@triton.jit
def _key_step(
    key_total, value_total, own, grad, other, values, joined, shift, visible, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_MASKED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dK (before scaling) and dV of a tile of keys; scores stand transposed."""
    scores = _dot(other, tl.trans(own), tl.zeros([COLUMNS, ROWS], dtype=tl.float32), WIDEN)
    exponents = scores * factor - joined[None, :]
    if IS_MASKED:
        exponents = tl.where(visible, exponents, float("-inf"))
    weights = tl.exp2(exponents)
    value_total = _dot(weights.to(grad.dtype), grad, value_total, WIDEN)
    change = _dot(values, tl.trans(grad), tl.zeros([COLUMNS, ROWS], dtype=tl.float32), WIDEN)
    change = weights * (change - shift[None, :])
    return _dot(change.to(own.dtype), own, key_total, WIDEN), value_total


@triton.jit
def key_gradient_kernel(
    query, key, value, gradient, key_result, value_result, sums, delta,
    starts, blocks, masked_starts, masked_blocks, begin, reach,
    query_head, query_token, key_head, key_token, value_head, value_token, gradient_head, gradient_token,
    queries, keys, before, list_rows, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, over the query blocks that list its block; results (Hkv, N, d), contiguous."""
    PARTS: tl.constexpr = (QUERY_BLOCK * GROUP + ROWS - 1) // ROWS
    SPLIT: tl.constexpr = KEY_BLOCK // COLUMNS
    tile = tl.program_id(0)  # earlier keys, which more queries see, first
    head = tl.program_id(1)
    first = tile * COLUMNS
    other = _cut_tile(key + head.to(tl.int64) * key_head, first, keys, key_token, COLUMNS, WIDTH, PADDED)
    values = _cut_tile(value + head.to(tl.int64) * value_head, first, keys, value_token, COLUMNS, WIDTH, PADDED)
    columns = first + tl.arange(0, COLUMNS)
    row = head * list_rows + tile // SPLIT
    factor = scale * LOG2E
    key_total = tl.zeros([COLUMNS, PADDED], dtype=tl.float32)
    value_total = tl.zeros([COLUMNS, PADDED], dtype=tl.float32)

    for step in tl.range(tl.load(starts + row) * PARTS, tl.load(starts + row + 1) * PARTS):
        block = tl.load(blocks + step // PARTS)
        tokens, heads, live = _rows(block, step % PARTS, before, queries, QUERY_BLOCK, GROUP, ROWS)
        heads += head * GROUP
        flat = heads.to(tl.int64) * queries + tokens
        own = _states(query, tokens, heads, live, query_head, query_token, WIDTH, PADDED)
        grad = _states(gradient, tokens, heads, live, gradient_head, gradient_token, WIDTH, PADDED)
        joined = tl.load(sums + flat, mask=live, other=float("inf")) * LOG2E  # no query: no weight
        shift = tl.load(delta + flat, mask=live, other=0.0)
        key_total, value_total = _key_step(
            key_total, value_total, own, grad, other, values, joined, shift, live, factor, ROWS, COLUMNS, False, WIDEN
        )

    for step in tl.range(tl.load(masked_starts + row) * PARTS, tl.load(masked_starts + row + 1) * PARTS):
        block = tl.load(masked_blocks + step // PARTS)
        tokens, heads, live = _rows(block, step % PARTS, before, queries, QUERY_BLOCK, GROUP, ROWS)
        seen = tl.load(reach + tokens, mask=live, other=-1)
        since = tl.load(begin + tokens, mask=live, other=keys)
        if (first <= tl.max(seen, 0)) & (first + COLUMNS > tl.min(since, 0)):
            heads += head * GROUP
            flat = heads.to(tl.int64) * queries + tokens
            own = _states(query, tokens, heads, live, query_head, query_token, WIDTH, PADDED)
            grad = _states(gradient, tokens, heads, live, gradient_head, gradient_token, WIDTH, PADDED)
            joined = tl.load(sums + flat, mask=live, other=float("inf")) * LOG2E
            shift = tl.load(delta + flat, mask=live, other=0.0)
            visible = (columns[:, None] <= seen[None, :]) & (columns[:, None] >= since[None, :])
            key_total, value_total = _key_step(
                key_total, value_total, own, grad, other, values, joined, shift, visible, factor,
                ROWS, COLUMNS, True, WIDEN,
            )  # fmt: skip

    none = tl.zeros([COLUMNS], dtype=tl.int32) + head
    _store(key_result, key_total * scale, columns, none, columns < keys, keys * WIDTH, WIDTH, WIDTH, PADDED)
    _store(value_result, value_total, columns, none, columns < keys, keys * WIDTH, WIDTH, WIDTH, PADDED)
