"""Recovered mass: against NumPy from the definition, its sums, and its rulers in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import DYNAMIC, STATIC, layouts, may_see
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.attention.layout import Layout
from unclipped.attention.mass import PAIRS, attended_blocks, block_mass, kept_mass, random_shares
from unclipped.attention.patterns import Full
from unclipped.attention.plan import build_plan
from unclipped.attention.rulers import Ruler
from unclipped.attention.syntax import parse_pattern

BLOCKS: dict[str, Any] = {"key_block": 4, "query_block": 8}
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def states(layout: Layout, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.length, WIDTH)
    return (
        2 * torch.randn(HEADS, *shape, generator=generator, dtype=torch.float64),
        2 * torch.randn(KEY_HEADS, *shape, generator=generator, dtype=torch.float64),
    )


def attention(query: torch.Tensor, key: torch.Tensor, layout: Layout, scale: float) -> np.ndarray:
    """softmax(QKᵀ·scale) over visible keys by the definition, float64 (H, N, N)."""
    keys = np.repeat(key.numpy(), HEADS // KEY_HEADS, axis=0)
    scores = np.einsum("hqd,hkd->hqk", query.numpy(), keys) * scale
    scores = np.where(may_see(layout), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


FLOAT32 = 5e-6
"""Rounding of a sum of some hundred float32 probabilities: up to 136 of them, of half an ulp of 1 (6e-8) each."""


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), text=st.sampled_from([*STATIC, *DYNAMIC]), seed=st.integers(0, 5))
def test_kept_mass_is_that_of_the_definition(layout: Layout, text: str, seed: int) -> None:
    query, key = states(layout, seed)
    pattern = parse_pattern(text)
    plan = build_plan(pattern, layout, **BLOCKS, query=query, key=key, scale=0.3, key_heads=KEY_HEADS)
    mass = block_mass(query, key, layout, scale=0.3, **BLOCKS)
    kept = kept_mass(mass, plan, KEY_HEADS)

    true = attention(query, key, layout, 0.3)
    mask = np.broadcast_to(plan.element_mask().numpy(), (KEY_HEADS, layout.length, layout.length))
    mask = np.repeat(mask, HEADS // KEY_HEADS, axis=0)
    kinds = layout.is_visual.astype(int)
    for index, pair in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        of_pair = (kinds[:, None] == pair[0]) & (kinds[None, :] == pair[1])
        wanted = (true * (mask & of_pair)).sum(axis=(1, 2)) / layout.length
        assert kept.pattern[:, index] == pytest.approx(wanted, abs=FLOAT32), PAIRS[index]
        wanted = (true * of_pair).sum(axis=(1, 2)) / layout.length
        assert mass.by_pair[:, index] == pytest.approx(wanted, abs=FLOAT32)
    assert mass.by_pair.sum(axis=1) == pytest.approx(1.0, abs=FLOAT32)
    assert kept.density.mean() == pytest.approx(plan.density, abs=1e-9)
    assert kept.oracle.sum(axis=1).mean() >= kept.pattern.sum(axis=1).mean() - 1e-6, "no choice keeps more"


def test_a_full_pattern_keeps_everything() -> None:
    layout = Layout.from_token_types([0] * 5 + [1] * 40 + [0] * 6, [(1, 5, 8)])
    query, key = states(layout)
    plan = build_plan(Full(), layout, **BLOCKS, key_heads=KEY_HEADS)
    kept = kept_mass(block_mass(query, key, layout, scale=0.5, **BLOCKS), plan, KEY_HEADS)
    for values in (kept.pattern, kept.oracle, kept.random):
        assert values.sum(axis=1) == pytest.approx(1.0, abs=1e-6)
    assert kept.density == pytest.approx(1.0)


def grouped_attention() -> tuple[Layout, torch.Tensor, torch.Tensor]:
    """Queries and keys of blocks that attend to the blocks of their own colour: what a selection can find."""
    layout = Layout.from_token_types([0] * 256)
    generator = torch.Generator().manual_seed(1)
    colours = torch.nn.functional.one_hot(torch.arange(256) // 8 % 4, WIDTH).double()
    noise = torch.randn(2, 256, WIDTH, generator=generator).double() * 0.1
    return layout, (8 * colours + noise[0]).expand(HEADS, -1, -1), (colours + noise[1]).expand(KEY_HEADS, -1, -1)


def test_the_rulers_stand_on_both_sides_of_a_good_selection() -> None:
    layout, query, key = grouped_attention()
    mass = block_mass(query, key, layout, scale=1.0, **BLOCKS)

    def keeps(text: str) -> Any:
        plan = build_plan(parse_pattern(text), layout, **BLOCKS, query=query, key=key, scale=1.0)
        kept = kept_mass(mass, plan, KEY_HEADS)
        return kept.oracle.sum(axis=1).mean(), kept.pattern.sum(axis=1).mean(), kept.random.sum(axis=1).mean()

    oracle, chosen, random = keeps("topk(6)")
    assert oracle >= chosen > random + 0.1
    drawn = [keeps(f"random(6, seed={seed})") for seed in range(24)]
    assert np.mean([one[1] for one in drawn]) == pytest.approx(drawn[0][2], abs=0.02), "the expectation of drawing"


def test_ruler_patterns_choose_as_many_blocks() -> None:
    layout, query, key = grouped_attention()
    mass = block_mass(query, key, layout, scale=1.0, **BLOCKS)
    given: dict[str, Any] = {**BLOCKS, "query": query, "key": key, "scale": 1.0}
    for text in ("topk(3)", "sink(4) + window(20)", "per_head(topk(1) | window(9))"):
        pattern = parse_pattern(text)
        own = build_plan(pattern, layout, **given)
        kept = kept_mass(mass, own, KEY_HEADS)
        oracle = build_plan(Ruler(pattern, "oracle"), layout, **given)
        random = build_plan(Ruler(pattern, "random"), layout, **given)
        assert np.array_equal(np.broadcast_to(own.counts, oracle.counts.shape), oracle.counts), (
            "as many for each query block"
        )
        assert np.array_equal(oracle.counts, random.counts)
        found = kept_mass(mass, oracle, KEY_HEADS)
        assert found.pattern == pytest.approx(kept.oracle, abs=1e-6)
    assert not np.array_equal(
        build_plan(Ruler(pattern, "random").for_layer(0), layout, **given).lists,
        build_plan(Ruler(pattern, "random").for_layer(1), layout, **given).lists,
    ), "layers draw anew"


def test_shares_of_random_blocks_add_up_to_the_counts() -> None:
    free = np.tril(np.ones((6, 6), dtype=bool), -1)
    counts = np.array([[0, 1, 2, 2, 3, 4]])
    shares = random_shares(free, counts)
    assert shares.sum(axis=-1) == pytest.approx(counts)
    assert (shares[0, 1:, 0] == 1.0).all()


def test_attended_blocks_are_those_of_the_element_mask() -> None:
    layout = Layout.from_token_types([0] * 50)
    query, key = states(layout)
    for text in ("topk(2)", "window(9)", "per_head(sink | window(20))"):
        plan = build_plan(parse_pattern(text), layout, **BLOCKS, query=query, key=key)
        mask = plan.element_mask().numpy()
        blocks = attended_blocks(plan)
        for head in range(len(mask)):
            for row in range(blocks.shape[1]):
                for column in range(blocks.shape[2]):
                    some = mask[head, row * 8 : row * 8 + 8, column * 4 : column * 4 + 4].any()
                    assert some == blocks[head, row, column]
