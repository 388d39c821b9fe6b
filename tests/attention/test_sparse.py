from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from attention.cases import DYNAMIC, STATIC, attention64, layouts, may_see, naive_mask
from unclipped.attention.layout import Layout
from unclipped.attention.plan import build_plan
from unclipped.attention.sparse import sparse_attention
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError

LAYOUT = Layout.from_token_types([0] * 5 + [1] * 70 + [0] * 9 + [1] * 40 + [0] * 7, [(1, 7, 10), (2, 4, 5)])
BLOCKS = {"key_block": 8, "query_block": 16}
SCALE = 0.3


def states(
    heads: int, key_heads: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, length, 16), (1, key_heads, length, 16), (1, key_heads, length, 16))
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", [*STATIC, *DYNAMIC])
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_backends_agree_with_float64(text: str, heads: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    query, key, value = states(*heads, LAYOUT.length, dtype)
    if text.startswith("per_head") and heads[1] < 2:
        text = text.replace("|", "+").removeprefix("per_head")  # one key head, one pattern
    plan = build_plan(parse_pattern(text), LAYOUT, **BLOCKS, query=query[0], key=key[0], scale=SCALE)
    expected = attention64(*(s[0].double().numpy() for s in (query, key, value)), plan.element_mask().numpy(), SCALE)
    output = sparse_attention(query, key, value, plan, scale=SCALE, backend=backend)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert np.abs(output[0].double().numpy() - expected).max() < tolerance


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), text=st.sampled_from(STATIC), size=st.sampled_from([(4, 4), (4, 8), (8, 24)]))
def test_static_plans_attend_to_what_the_pattern_means(layout: Layout, text: str, size: tuple[int, int]) -> None:
    pattern = parse_pattern(text)
    plan = build_plan(pattern, layout, key_block=size[0], query_block=size[1])
    mask = plan.element_mask().numpy()
    assert not (naive_mask(pattern, layout, *size) & ~mask).any()
    assert not (mask & ~may_see(layout)).any()
    dense = may_see(layout.with_sight(layout.sight))  # whose mask leaves keys out after their scores are formed
    assert plan.density == pytest.approx(mask.sum(axis=(1, 2)).mean() / dense.sum())


@pytest.mark.parametrize("text", ["window(20)", "topk(2)"])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_gradients_equal_those_of_the_definition(text: str, heads: tuple[int, int]) -> None:
    leaves = [s.double().requires_grad_() for s in states(*heads, LAYOUT.length)]
    plan = build_plan(parse_pattern(text), LAYOUT, **BLOCKS, query=leaves[0][0], key=leaves[1][0])
    upstream = torch.randn(
        1, heads[0], LAYOUT.length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    own, expected = (
        torch.autograd.grad(sparse_attention(*leaves, plan, scale=SCALE, backend=backend), leaves, upstream)
        for backend in ("gather", "reference")
    )
    for gradient, wanted in zip(own, expected, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(layout=layouts(), text=st.sampled_from(STATIC + DYNAMIC), size=st.sampled_from([(4, 4), (4, 8)]))
@example(layout=Layout.from_token_types([1] * 9, [(1, 3, 3)], sight="all"), text="full", size=(4, 4))
@example(layout=Layout.from_token_types([1] * 19, [(1, 1, 19)], sight="all"), text="full", size=(4, 8))
def test_gather_agrees_with_float64_under_each_rule_for_later_tokens(
    layout: Layout, text: str, size: tuple[int, int]
) -> None:
    """Where later tokens are seen, lists also move backwards from one query block to the next."""
    query, key, value = states(4, 2, layout.length)
    blocks = dict(zip(("key_block", "query_block"), size, strict=True))
    plan = build_plan(parse_pattern(text), layout, **blocks, query=query[0], key=key[0])
    found = sparse_attention(query, key, value, plan, scale=SCALE, backend="gather")
    expected = attention64(*(s[0].numpy() for s in (query, key, value)), plan.element_mask().numpy(), SCALE)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("text", ["window(40)", "sink(8) + window(40)", "topk(3)"])
@pytest.mark.parametrize("length", [128, 131])
def test_states_may_lie_in_memory_as_they_like(text: str, length: int) -> None:
    """Keys of a window are read where they stand; those of a model stand among the other heads."""
    layout = Layout.from_token_types([0] * length, [])
    query, key, value = states(4, 2, length)
    plan = build_plan(parse_pattern(text), layout, **BLOCKS, query=query[0], key=key[0])
    whole = sparse_attention(query, key, value, plan, scale=SCALE)
    expected = attention64(*(s[0].numpy() for s in (query, key, value)), plan.element_mask().numpy(), SCALE)
    np.testing.assert_allclose(whole[0].numpy(), expected, atol=1e-5)
    among = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in (query, key, value)]
    assert not among[1][0, 0].is_contiguous()
    torch.testing.assert_close(sparse_attention(*among, plan, scale=SCALE), whole)
    behind = [torch.cat([torch.full_like(s, 1e4), s], dim=2)[:, :, length:] for s in (query, key, value)]
    torch.testing.assert_close(sparse_attention(*behind, plan, scale=SCALE), whole)


def test_gradients_by_finite_differences() -> None:
    layout = Layout.from_token_types([0] * 13)
    leaves = [s[..., :3].double().requires_grad_() for s in states(2, 1, 13)]
    plan = build_plan(parse_pattern("window(5) + sink"), layout, key_block=2, query_block=4)
    assert torch.autograd.gradcheck(lambda *s: sparse_attention(*s, plan, scale=SCALE), leaves)


@pytest.mark.parametrize("length", [1, 7, 16, 17, 64, 100])
def test_a_full_plan_is_dense_attention(length: int) -> None:
    query, key, value = states(4, 2, length)
    plan = build_plan(parse_pattern("full"), Layout.from_token_types([0] * length), **BLOCKS)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
    assert plan.density == pytest.approx(1.0)
    assert torch.allclose(sparse_attention(query, key, value, plan, scale=SCALE), dense, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), text=st.sampled_from(STATIC), seed=st.integers(0, 99), data=st.data())
def test_a_future_token_changes_nothing(layout: Layout, text: str, seed: int, data: st.DataObject) -> None:
    layout = layout.with_sight("causal")
    place = data.draw(st.integers(0, layout.length - 1))
    plan = build_plan(parse_pattern(text), layout, key_block=4, query_block=8, key_heads=2)
    first, second = (states(4, 2, layout.length, seed=seed) for _ in range(2))
    for changed in second:
        changed[:, :, place:] += 3.0
    outputs = [sparse_attention(*s, plan, scale=SCALE)[:, :, :place] for s in (first, second)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("text", ["topk(2)", "topk(2, stride=4)", "mass(0.5)", "random(2)"])
def test_a_later_block_changes_no_selection(text: str) -> None:
    """Within a query block the selection is shared, so it may depend on the block's own later queries, no further."""
    first, second = states(2, 1, 131), states(2, 1, 131)
    for changed in second:
        changed[:, :, 64:] += 3.0
    outputs = []
    for query, key, value in (first, second):
        plan = build_plan(parse_pattern(text), LAYOUT, **BLOCKS, query=query[0], key=key[0])
        outputs.append(sparse_attention(query, key, value, plan, scale=SCALE)[:, :, :64])
    assert torch.equal(*outputs)


def test_topk_takes_the_best_blocks_of_each_key_head() -> None:
    """The keys of one earlier block point along the queries: that block, and block 0, are taken."""
    query, key, _ = states(2, 2, 131)
    query[:] = 1.0
    key[0, 0, 24:32] += 2.0
    key[0, 1, 40:48] += 2.0
    plan = build_plan(parse_pattern("topk(1)"), LAYOUT, **BLOCKS, query=query[0], key=key[0])
    assert plan.lists[:, 5, :2].tolist() == [[0, 3], [0, 5]]


def test_selections_share_lists_but_not_across_key_heads() -> None:
    query, key, _ = states(4, 2, LAYOUT.length)
    plan = build_plan(parse_pattern("topk(2)"), LAYOUT, **BLOCKS, query=query[0], key=key[0])
    assert plan.lists.shape[0] == 2
    assert build_plan(parse_pattern("window(9)"), LAYOUT, **BLOCKS).lists.shape[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (2, 4, 131, 16)}, "expected"),
        ({"query": (1, 3, 131, 16)}, "H a multiple of Hkv"),
        ({"value": (1, 2, 130, 16)}, "expected"),
        ({"query": (1, 4, 100, 16), "key": (1, 2, 100, 16), "value": (1, 2, 100, 16)}, "the plan is for 131 tokens"),
    ],
)
def test_bad_shapes(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"query": (1, 4, 131, 16), "key": (1, 2, 131, 16), "value": (1, 2, 131, 16)} | change
    plan = build_plan(parse_pattern("window(9)"), LAYOUT, **BLOCKS)
    with pytest.raises(UsageError, match=message):
        sparse_attention(*(torch.zeros(shape) for shape in shapes.values()), plan, scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_block": 8, "query_block": 12}, "must be a multiple"),
        ({"key_block": 0, "query_block": 12}, "both at least 1"),
    ],
)
def test_bad_blocks(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_plan(parse_pattern("full"), LAYOUT, **arguments)


def test_plans_of_dynamic_patterns_ask_for_states() -> None:
    query, key, value = states(2, 1, 100)
    with pytest.raises(UsageError, match="give both"):
        build_plan(parse_pattern("topk(2)"), LAYOUT)
    with pytest.raises(UsageError, match="the layout has 131 tokens, the queries 100"):
        build_plan(parse_pattern("topk(2)"), LAYOUT, query=query[0], key=key[0])
    plan = build_plan(parse_pattern("full"), Layout.from_token_types([0] * 100))
    with pytest.raises(UsageError, match="expected one of gather, triton, flex, reference, found 'flash'"):
        sparse_attention(query, key, value, plan, scale=1.0, backend="flash")
