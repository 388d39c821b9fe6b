from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.cases import DYNAMIC, STATIC, layouts
from unclipped.attention.blocks import Blocks
from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Pattern
from unclipped.attention.syntax import parse_pattern, pattern_names
from unclipped.core.errors import UsageError


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), text=st.sampled_from(STATIC), size=st.sampled_from([(4, 4), (4, 8), (3, 9), (8, 16)]))
def test_touched_blocks_hold_every_element(layout: Layout, text: str, size: tuple[int, int]) -> None:
    pattern = parse_pattern(text)
    rows, columns = Blocks(layout, size[1]), Blocks(layout, size[0])
    everything = np.arange(layout.length)
    element = pattern.element(layout, everything, everything)
    element = element if element.ndim == 3 else element[None]
    touched = pattern.touches(rows, columns)
    for row in range(rows.count):
        for column in range(columns.count):
            queries = slice(rows.first[row], rows.last[row] + 1)
            held = element[:, queries, columns.first[column] : columns.last[column] + 1].any(axis=(1, 2))
            assert (touched[:, row, column] | ~held).all(), (text, row, column)


@pytest.mark.parametrize("text", ["window(6)", "sink(5)", "global_text", "full"])
def test_one_dimensional_bounds_are_exact(text: str) -> None:
    layout = Layout.from_token_types([0] * 9 + [1] * 23 + [0] * 4)
    blocks, everything = Blocks(layout, 4), np.arange(layout.length)
    element = parse_pattern(text).element(layout, everything, everything)
    held = element.reshape(9, 4, 9, 4).any(axis=(1, 3))
    assert np.array_equal(parse_pattern(text).touches(blocks, blocks)[0], held)


def test_two_dimensional_window_leaves_far_rows_out() -> None:
    layout = Layout.from_token_types([1] * 256, [(1, 16, 16)])
    blocks = Blocks(layout, 16)  # a block is a row of the image
    touched = parse_pattern("window2d(2, 16)").touches(blocks, blocks)[0]
    rows = np.arange(16)
    assert np.array_equal(touched, np.abs(rows[:, None] - rows[None, :]) <= 2)


@pytest.mark.parametrize(
    "text",
    [*STATIC, *DYNAMIC, "(sink + window(8)) & global_text", "sink(size=2) & (full + window(3)) + same_image"],
)
def test_text_is_read_back_exactly(text: str) -> None:
    pattern = parse_pattern(text)
    assert parse_pattern(str(pattern)) == pattern
    assert str(parse_pattern(str(pattern))) == str(pattern)


def test_union_and_intersection_are_flat_and_bind_as_written() -> None:
    assert str(parse_pattern("sink + full + window(4)")) == "sink + full + window(size=4)"
    pattern = parse_pattern("sink + full & window(4)")
    assert pattern == parse_pattern("sink") + (parse_pattern("full") & parse_pattern("window(size=4)"))


def test_every_name_has_an_example_that_is_read() -> None:
    read = {inner.name for text in (*STATIC, *DYNAMIC, "per_layer(full)") for inner in parse_pattern(text).walk()}
    assert set(pattern_names()) == read - {""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windw(4)", "unknown pattern 'windw'; did you mean 'window'"),
        ("window", "size must be given, as in window"),
        ("window(0)", "size must be at least 1, found 0"),
        ("topk(k=-3)", "k must be at least 1, found -3"),
        ("topk(kk=3)", "unknown value 'kk'; did you mean 'k'"),
        ("topk(k=3, k=4)", "'k' is given twice"),
        ("topk(2.5)", "k must be a whole number, found '2.5'"),
        ("mass(1.5)", "at most 1, found 1.5"),
        ("mass(0.5, least=4, most=2)", r"most \(2\) is below least \(4\)"),
        ("grid(2, axis=colum)", "unknown axis 'colum'; did you mean 'column'"),
        ("sink + ", "expected a pattern, found its end"),
        ("sink sink", "expected '\\+', '&' or its end, found 'sink'"),
        ("(sink", "expected '\\)', found its end"),
        ("sink(1, 2)", "takes 1 values"),
        ("sink ? full", "cannot read '\\? full'"),
        ("", "expected a pattern"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize("text", DYNAMIC)
def test_dynamic_patterns_say_that_they_need_queries(text: str) -> None:
    pattern: Pattern = parse_pattern(text)
    layout = Layout.from_token_types([0] * 16)
    assert pattern.is_dynamic
    with pytest.raises(UsageError, match="from queries and keys"):
        pattern.touches(Blocks(layout, 4), Blocks(layout, 4))
