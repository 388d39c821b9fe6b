"""What dynamic patterns choose from, against its definition written out token by token in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.cases import layouts, may_see
from unclipped.attention.blocks import Blocks
from unclipped.attention.layout import Layout
from unclipped.attention.scoring import BlockScores, VerticalSlash

HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 8, 0.7


class Case(NamedTuple):
    layout: Layout
    offset: int
    stop: int
    query: np.ndarray
    """(H, stop - offset, d)"""
    key: np.ndarray
    """(Hkv, stop, d)"""
    scores: BlockScores


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[tuple[int, int], ...] = ((4, 4), (4, 8), (3, 9))) -> Case:
    """A chunk of a row (mostly all of it) with random states; sizes: (key block, query block)."""
    layout = draw(layouts())
    stop = draw(st.integers(1, layout.length) | st.just(layout.length))
    offset = draw(st.integers(0, stop - 1) | st.just(0))
    key_block, query_block = draw(st.sampled_from(sizes))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    query = generator.standard_normal((HEADS, stop - offset, WIDTH)).astype(np.float32)
    key = generator.standard_normal((KEY_HEADS, stop, WIDTH)).astype(np.float32)
    rows = Blocks(layout, query_block, offset // query_block, -(-stop // query_block))
    columns = Blocks(layout, key_block, 0, -(-stop // key_block))
    everything = np.ones((rows.count, columns.count), dtype=bool)
    states = torch.from_numpy(query), torch.from_numpy(key)
    return Case(
        layout, offset, stop, query, key, BlockScores(*states, rows, columns, SCALE, everything, offset)
    )  # fmt: skip


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(case=cases(), probes=st.integers(1, 6))
def test_probes_see_what_attention_sees(case: Case, probes: int) -> None:
    layout, size = case.layout, case.scores.key_blocks.size
    sight, count = may_see(layout), case.scores.key_blocks.count
    column, slash = np.zeros((KEY_HEADS, count)), np.zeros((KEY_HEADS, count))
    group = HEADS // KEY_HEADS
    for segment in layout.segments:
        stop = min(segment.start + segment.length, case.stop)
        for place in range(max(segment.start, case.offset, stop - probes), stop):
            for head in range(HEADS):
                key = case.key[head // group].astype(np.float64)
                seen = np.flatnonzero(sight[place, : case.stop])
                weights = softmax(key[seen] @ case.query[head, place - case.offset].astype(np.float64) * SCALE)
                for token, weight in zip(seen, weights / group, strict=True):
                    column[head // group, token // size] += weight
                    slash[head // group, max(0, place - token) // size] += weight
    found = case.scores.probed(probes)
    np.testing.assert_allclose(found[0].numpy(), column, atol=2e-5)
    np.testing.assert_allclose(found[1].numpy(), slash, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(case=cases(), columns=st.integers(0, 2), slashes=st.integers(0, 2))
def test_vertical_slash_keeps_its_columns_and_diagonals(case: Case, columns: int, slashes: int) -> None:
    rows, keys = case.scores.query_blocks, case.scores.key_blocks
    kept = VerticalSlash(columns, slashes, probes=3).touches(rows, keys, case.scores)
    column, slash = case.scores.probed(3)
    for head in range(KEY_HEADS):
        best_columns = set(column[head].topk(min(columns, keys.count)).indices.tolist())
        best_slashes = set(slash[head].topk(min(slashes, keys.count)).indices.tolist())
        for row in range(rows.count):
            queries = range(int(rows.first[row]), int(rows.last[row]) + 1)
            for place in range(keys.count):
                tokens = range(place * keys.size, min((place + 1) * keys.size, case.stop))
                on_slash = any((i - j) // keys.size in best_slashes for i in queries for j in tokens if i >= j)
                assert kept[head, row, place] == (place == 0 or place in best_columns or on_slash)


@settings(max_examples=60, deadline=None)
@given(case=cases(sizes=((4, 4), (4, 8))), stride=st.sampled_from([1, 2, 4]))
def test_antidiagonals_are_summed_inside_blocks(case: Case, stride: int) -> None:
    rows, keys, group = case.scores.query_blocks, case.scores.key_blocks, HEADS // KEY_HEADS
    filled = -case.stop % stride
    query = np.zeros((HEADS, case.stop + filled, WIDTH))  # queries that are not there count as zero
    query[:, case.offset : case.stop] = case.query
    key = np.pad(case.key.astype(np.float64), ((0, 0), (0, filled), (0, 0)))
    reach = np.minimum(case.layout.reach[: case.stop], case.stop - 1)
    expected = np.zeros((KEY_HEADS, rows.count, keys.count))
    for fold in range(case.offset // stride, (case.stop + filled) // stride):
        own = slice(fold * stride, (fold + 1) * stride)
        last = case.stop - 1 if own.stop > case.stop else int(reach[own].max())
        first = int(case.layout.begin[own.start]) // stride
        for head in range(HEADS):
            reversed_query = query[head, own][::-1]
            others = key[head // group, first * stride : (last // stride + 1) * stride].reshape(-1, stride, WIDTH)
            sums = np.einsum("id,fid->f", reversed_query, others)
            for other, weight in enumerate(softmax(sums * SCALE / stride), start=first):
                expected[head // group, own.start // rows.size - rows.begin, other * stride // keys.size] += weight
    expected /= np.maximum(expected.sum(axis=-1, keepdims=True), 1e-20)
    np.testing.assert_allclose(case.scores.antidiagonal(stride).numpy(), expected, atol=2e-5)


def test_probes_of_the_image_find_what_those_of_the_text_do_not() -> None:
    layout = Layout.from_token_types([0] * 8 + [1] * 48 + [0] * 8, [(1, 6, 8)])
    query, key = torch.zeros(1, 64, WIDTH), torch.zeros(1, 64, WIDTH)
    key[0, 16:20] = 9.0  # one block that only the image's own tokens look for
    query[0, 8:56] = 1.0
    blocks = Blocks(layout, 4)
    scores = BlockScores(query, key, blocks, blocks, SCALE, np.tril(np.ones((16, 16), dtype=bool), -1))
    kept = VerticalSlash(1, 0, probes=4).touches(blocks, blocks, scores)
    assert kept[0, 10].tolist() == [place in (0, 4) for place in range(16)]
