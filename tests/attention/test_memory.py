"""Work buffers do not grow with the row: attention, pooling and antidiagonal scores go by portions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention.cases import attention64
from unclipped.attention import scoring, sparse
from unclipped.attention.layout import Layout
from unclipped.attention.plan import build_plan
from unclipped.attention.scoring import block_means
from unclipped.attention.sparse import sparse_attention
from unclipped.attention.syntax import parse_pattern

BLOCKS: dict[str, int] = {"key_block": 8, "query_block": 16}
WIDTH, SCALE = 16, 0.3


def states(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, WIDTH, generator=generator).to(dtype) for heads in (4, 2, 2)]


def rows_at_once(length: int, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Most bytes of keys, values and results of one call of the kernel, and the number of calls."""
    kernel, sizes = sparse._flash, []

    def watched(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        gathered = 0 if rest[1] else 2 * key[:, 0].numel()  # the diagonal's keys are views
        sizes.append((gathered + 2 * query.numel()) * query.element_size())
        return kernel(query, key, value, *rest, **options)

    query, key, value = states(length)
    plan = build_plan(parse_pattern(text), Layout.from_token_types([0] * length), **BLOCKS, query=query[0], key=key[0])
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "_flash", watched)
        sparse_attention(query, key, value, plan, scale=SCALE)
    return max(sizes), len(sizes)


@pytest.mark.parametrize("text", ["sink(8) + window(20)", "topk(2)"])
def test_calls_grow_in_number_not_in_size(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 15
    monkeypatch.setattr(sparse, "_WORK_BYTES", limit)
    short, long = (rows_at_once(length, text, monkeypatch) for length in (512, 2048))
    assert short[0] <= limit
    assert long[0] <= limit
    assert long[1] > 3 * short[1]


@pytest.mark.parametrize("sight", ["causal", "images", "all"])
def test_portions_change_nothing(sight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query block at a time, forward and backward, as the definition has it."""
    layout = Layout.from_token_types([0] * 5 + [1] * 70 + [0] * 56, [(1, 7, 10)], sight=sight)
    plan = build_plan(parse_pattern("global_text + sink(9) + window2d(1, 2)"), layout, **BLOCKS)
    upstream = torch.randn(1, 4, layout.length, WIDTH, generator=torch.Generator().manual_seed(1))
    found = []
    for limit in (1, 1 << 23):
        monkeypatch.setattr(sparse, "_WORK_BYTES", limit)
        leaves = [s.requires_grad_() for s in states(layout.length)]
        output = sparse_attention(leaves[0], leaves[1], leaves[2], plan, scale=SCALE)
        found.append([output.detach(), *torch.autograd.grad(output, leaves, upstream)])
    query, key, value = (s[0].numpy() for s in states(layout.length))
    wanted = attention64(query, key, value, plan.element_mask().numpy(), SCALE)
    assert np.abs(found[0][0][0].numpy() - wanted).max() < 1e-5
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("length", "lacking"), [(96, 0), (100, 0), (7, 0), (93, 5), (9, 7)])
def test_means_of_blocks(dtype: torch.dtype, length: int, lacking: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 at least, of states in any order of axes, the first and the last block over what they have."""
    monkeypatch.setattr(scoring, "_POOLED_BYTES", 4 * 3 * 16 * 8 * 2)  # two blocks a portion
    tokens = torch.randn(length, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    means = block_means(tokens.transpose(0, 1), 16, lacking)  # (3, blocks, 8)
    edges = [0, *range(16 - lacking, length, 16), length]
    wanted = np.stack([tokens.double().numpy()[a:b].mean(axis=0) for a, b in pairwise(edges)])
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert np.abs(means.transpose(0, 1).double().numpy() - wanted).max() < 1e-6


@pytest.mark.parametrize("sight", ["causal", "images"])
@pytest.mark.parametrize("offset", [0, 39])
def test_antidiagonals_by_portions(sight: Any, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.from_token_types([0] * 5 + [1] * 70 + [0] * 56, [(1, 7, 10)], sight=sight)
    query, key, _ = (s[0] for s in states(layout.length))
    lists = []
    for limit in (1, 1 << 21):
        monkeypatch.setattr(scoring, "_FOLDED_BYTES", limit)
        plan = build_plan(
            parse_pattern("topk(2, stride=4)"), layout, **BLOCKS, query=query[:, offset:], key=key, offset=offset
        )
        lists.append((plan.lists, plan.partial))
    assert torch.equal(lists[0][0], lists[1][0])
    assert torch.equal(lists[0][1], lists[1][1])
