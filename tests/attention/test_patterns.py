from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.cases import DYNAMIC, STATIC, layouts, may_see
from unclipped.attention.blocks import Blocks
from unclipped.attention.layout import Layout
from unclipped.attention.parts import PerHead, PerLayer
from unclipped.attention.patterns import Pattern
from unclipped.attention.plan import build_plan, refuse_empty_rows
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


STATIC_LEAVES = ("full", "sink(3)", "window(7)", "global_text", "same_image", "window2d(1, 2)", "window3d(0, 1, 2)",
    "grid(3)", "grid(2, axis=row)", "tiles(2, 3)")  # fmt: skip
DYNAMIC_LEAVES = (
    "topk(2)", "topk(2, stride=4)", "mass(0.25)", "mass(0.5, most=3)", "vertical_slash(1, 2)", "random(2)",
)  # fmt: skip


def patterns(leaves: tuple[str, ...]) -> st.SearchStrategy[Pattern]:
    """Unions and intersections of any shape, in lists for heads and layers."""
    single = st.sampled_from(leaves).map(parse_pattern)
    flat = st.recursive(
        single, lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] + t[1] if t[2] else t[0] & t[1])
    )
    heads = st.lists(flat, min_size=1, max_size=3).map(lambda parts: PerHead(tuple(parts)))
    mixed = flat | heads | st.tuples(flat, heads).map(lambda pair: pair[0] + pair[1])
    return mixed | st.lists(mixed, min_size=1, max_size=4).map(lambda parts: PerLayer(tuple(parts)))


@settings(max_examples=150, deadline=None)
@given(pattern=patterns(STATIC_LEAVES + DYNAMIC_LEAVES))
def test_any_pattern_is_printed_and_read_back_exactly(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert str(parse_pattern(str(pattern))) == str(pattern)


@settings(max_examples=100, deadline=None)
@given(pattern=patterns(STATIC_LEAVES), layout=layouts(), size=st.sampled_from([(4, 4), (4, 8), (3, 9)]))
def test_a_block_is_touched_wherever_an_element_is(pattern: Pattern, layout: Layout, size: tuple[int, int]) -> None:
    pattern = pattern.for_layer(1)
    rows, columns, everything = Blocks(layout, size[1]), Blocks(layout, size[0]), np.arange(layout.length)
    element = pattern.element(layout, everything, everything)
    touched = pattern.touches(rows, columns)
    element, touched = (a if a.ndim == 3 else a[None] for a in (element, touched))
    heads = max(len(element), len(touched))
    held = np.logical_or.reduceat(np.logical_or.reduceat(element, rows.first, axis=1), columns.first, axis=2)
    held, touched = (np.broadcast_to(a, (heads, *a.shape[1:])) for a in (held, touched))
    assert (touched | ~held).all()


def test_lists_repeat_their_last_entry() -> None:
    pattern = parse_pattern("sink + per_layer(2*full | window(4))")
    assert str(pattern) == "sink + per_layer(2*full | window(size=4))"
    assert [str(pattern.for_layer(layer)) for layer in (0, 1, 2, 9)] == [
        "sink + full", "sink + full", "sink + window(size=4)", "sink + window(size=4)",
    ]  # fmt: skip
    assert str(parse_pattern("per_head(full | 2*(sink + full))")) == "per_head(full | 2*(sink + full))"


@pytest.mark.parametrize("text", ["same_image", "window2d(1, 1) & window(3)", "per_head(full | global_text)"])
def test_rows_without_a_key_are_named(text: str) -> None:
    layout = Layout.from_token_types([1] * 40 + [0] * 300, [(1, 8, 5)])
    everything = np.arange(layout.length)
    element = parse_pattern(text).element(layout, everything, everything) & may_see(layout)
    element = element if element.ndim == 3 else element[None]
    first = int(np.flatnonzero(~element.any(axis=2).all(axis=0))[0])
    kind = "visual" if layout.is_visual[first] else "text"
    with pytest.raises(UsageError, match=rf"row {first} \({kind}\) has no key that it may see; add sink\(1\)"):
        build_plan(parse_pattern(text), layout, key_block=8, query_block=16)


@settings(max_examples=80, deadline=None)
@given(pattern=patterns(STATIC_LEAVES), layout=layouts())
def test_exactly_the_patterns_with_an_empty_row_are_refused(pattern: Pattern, layout: Layout) -> None:
    pattern, everything = pattern.for_layer(0), np.arange(layout.length)
    sight = may_see(replace(layout, window=0))  # a window leaves each row its own block of queries
    element = pattern.element(layout, everything, everything) & sight
    if element.any(axis=-1).all():
        refuse_empty_rows(pattern, layout)
    else:
        with pytest.raises(UsageError, match="has no key"):
            refuse_empty_rows(pattern, layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("per_head(per_head(full) | full)", "one per_head cannot stand inside another"),
        ("per_layer(0*full)", "expected a whole number from 1 to 1024 before '\\*', found '0'"),
        ("per_layer", "expected '\\(', found its end"),
        ("per_layer(full | )", "unknown pattern '\\)'"),
        ("per_layr(full)", "did you mean 'per_layer'"),
        ("tiles(4)", "columns must be given, as in tiles\\(rows=4, columns=4\\)"),
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
        ("(" * 3000 + "full" + ")" * 3000, "more than 20 levels deep"),
        ("full + " * 10**6, r"7,000,000 characters; the limit is 10,000"),
        ("per_layer(1024*per_head(1024*full))", "names more than 100,000 patterns"),
        ("topk(k=" + "9" * 30 + ")", r"k must be at most 2,147,483,647, found 999"),
        ("topk(k=" + "9" * 5000 + ")", "k must be a whole number, found '9999"),
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
