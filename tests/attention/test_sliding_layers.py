"""Layers with a sliding window of their own under a pattern: run by blocks, the window's border exact, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from attention.cases import may_see, naive_mask
from support.tiny_models import tiny_lm
from unclipped.attention.layout import Layout
from unclipped.attention.mass import block_mass, kept_mass
from unclipped.attention.observe import observed
from unclipped.attention.plan import build_plan
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError

BLOCKS: dict[str, int] = {"key_block": 8, "query_block": 16}
WINDOW, LENGTH = 40, 170
INSIDE = np.minimum(np.arange(LENGTH) + 1, WINDOW).sum() / (LENGTH * (LENGTH + 1) / 2)
"""Pairs inside the window over causal ones."""
TYPES = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": TYPES},
    "cohere2": {"layer_types": TYPES},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, "layer_types": TYPES},
}


def sliding_model(family: str = "gemma3_text") -> PreTrainedModel:
    """In float64, so that what is left of a difference is an error."""
    return tiny_lm(None, family, layers=2, sliding_window=WINDOW, **FAMILIES[family]).double()


def ids_of(length: int = LENGTH, rows: int = 1) -> Tensor:
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_pattern_on_sliding_layers_equals_the_model_itself(family: str) -> None:
    model, ids = sliding_model(family), ids_of()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids).logits
        with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse:
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)  # eager has a softmax in float32
            records = sparse.report()
    assert [record.mode for record in records] == ["sparse", "sparse"]
    assert records[0].density == pytest.approx(INSIDE)


@pytest.mark.parametrize("pattern", ["sink(8) + window(20)", "sink(8) + window(60)", "per_head(full | window(9))"])
def test_pattern_on_sliding_layers_attends_to_pattern_and_window(pattern: str) -> None:
    model, ids = sliding_model(), ids_of()
    layout = Layout.from_token_types([0] * LENGTH)
    blocks = naive_mask(parse_pattern(pattern), layout, BLOCKS["key_block"], BLOCKS["query_block"])  # (heads, N, N)
    masks = {
        name: as_added(model, blocks & may_see(layout.with_sight("causal", window)))
        for name, window in (("full_attention", 0), ("sliding_attention", WINDOW))
    }
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, attention_mask=masks).logits
        with sparse_prefill(model, pattern, fallback="never", **BLOCKS) as sparse:
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
            window, full = sparse.report()
    assert window.density < full.density
    inside = (blocks & may_see(layout.with_sight("causal", WINDOW))).sum(axis=(1, 2)).mean()
    assert window.density == pytest.approx(inside / may_see(layout).sum())


def as_added(model: PreTrainedModel, mask: np.ndarray) -> Tensor:
    """bool (key heads or 1, N, N) → what eager attention adds to its scores, (1, heads or 1, N, N)."""
    seen = torch.from_numpy(mask)
    if len(seen) > 1:
        seen = seen.repeat_interleave(model.config.num_attention_heads // len(seen), dim=0)
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_of_sliding_layers(side: str) -> None:
    """One row shorter than the window, one of several."""
    model, ids = sliding_model(), ids_of(rows=2)
    mask = torch.ones_like(ids)
    gap = slice(0, LENGTH - 30) if side == "left" else slice(30, None)
    mask[1, gap] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse:
            found = model(input_ids=ids, attention_mask=mask).logits
            assert all(record.mode == "sparse" for record in sparse.report())
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-9)


@pytest.mark.parametrize("pattern", ["full", "sink(8) + window(20)", "topk(2)", "vertical_slash(1, 2, probes=8)"])
@pytest.mark.parametrize("length", [30, WINDOW, WINDOW + 1])
def test_prompts_about_as_long_as_the_window(length: int, pattern: str) -> None:
    model, ids = sliding_model(), ids_of(length)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with sparse_prefill(model, pattern, fallback="never", **BLOCKS) as sparse:
            found = model(input_ids=ids).logits
            window, full = sparse.report()
    assert window.mode == full.mode == "sparse"
    if pattern == "full":
        assert torch.allclose(found, expected, atol=1e-9)
        assert full.density == pytest.approx(1.0)
    if length <= WINDOW and not parse_pattern(pattern).is_dynamic:
        assert window.density == full.density


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("size", [24, 64])
def test_chunks_behind_a_cache_that_keeps_the_window_alone(kind: str, size: int) -> None:
    """`generate` in chunks, and forwards by hand: keys before the window are gone from the cache."""
    model, ids = sliding_model(), ids_of(rows=2)
    mask = torch.ones_like(ids)
    mask[1, :45] = 0
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    if kind == "static":
        arguments["cache_implementation"] = "static"
    expected = model.generate(**arguments)
    with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse:
        assert torch.equal(model.generate(**arguments, prefill_chunk_size=size), expected)
        assert all(record.mode == "sparse" for record in sparse.report())


@pytest.mark.parametrize("pattern", ["full", "sink(8) + window(20)"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_by_hand_equal_the_whole_prompt(kind: str, pattern: str) -> None:
    model, ids = sliding_model(), ids_of()
    with sparse_prefill(model, pattern, fallback="never", **BLOCKS) as sparse, torch.no_grad():
        expected = model(input_ids=ids).logits
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=200)
        parts = []
        for chunk in ids.split([32, 64, 74], dim=1):
            parts.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
            assert all(record.mode == "sparse" for record in sparse.report())
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-9)


@pytest.mark.parametrize("pattern", ["topk(1)", "mass(0.3, most=2, stride=4)", "vertical_slash(1, 1, probes=8)"])
def test_dynamic_patterns_choose_inside_the_window(pattern: str) -> None:
    """A token beyond the window changes neither the choice nor the output."""
    model, ids = sliding_model(), ids_of()
    model.config.layer_types = ["sliding_attention"] * 2
    other = ids.clone()
    other[0, 0] = 251
    with sparse_prefill(model, pattern, fallback="never", **BLOCKS) as sparse, torch.no_grad():
        first, second = (model(input_ids=given).logits for given in (ids, other))
        assert all(record.density < INSIDE for record in sparse.report())
    reached = 2 * (WINDOW - 1) + BLOCKS["query_block"]  # two layers, and what shares a block of queries
    assert torch.equal(first[0, reached + 16 :], second[0, reached + 16 :])
    assert not torch.equal(first[0, :16], second[0, :16])


def test_training_through_sliding_layers() -> None:
    model, ids = sliding_model(), ids_of(90)
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, model.get_input_embeddings().weight)[0]
    with sparse_prefill(model, "full", fallback="never", **BLOCKS):
        found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, model.get_input_embeddings().weight)[0]
    assert torch.allclose(found, expected, atol=1e-9)


def test_chunked_attention_is_refused_by_name_under_never() -> None:
    config = AutoConfig.for_model(
        "llama4_text", vocab_size=300, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        attention_chunk_size=48, layer_types=["full_attention", "chunked_attention"], no_rope_layers=[0, 1],
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), ids_of()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with (
            sparse_prefill(model, "full", fallback="never", **BLOCKS),
            pytest.raises(UsageError, match=r"layer 1 \(chunked_attention\): the layer has a mask of its own"),
        ):
            model(input_ids=ids)
        with sparse_prefill(model, "full", **BLOCKS) as sparse:
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
            assert "mask of its own" in str(sparse.report()[1].reason)


@pytest.mark.parametrize("border", [7, 90, 100, 163])
def test_packed_documents_under_windows_are_seen_wherever_they_meet(border: int) -> None:
    """The border hides few pairs under a narrow window: between the sampled queries, too."""
    model, ids = sliding_model(), ids_of()
    positions = torch.cat([torch.arange(border), torch.arange(LENGTH - border)])[None]
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        with (
            sparse_prefill(model, "full", fallback="never", **BLOCKS),
            pytest.raises(UsageError, match=r"layer 0 \(sliding_attention\).*packed documents"),
        ):
            model(input_ids=ids, position_ids=positions, use_cache=False)
        with sparse_prefill(model, "full", **BLOCKS):
            assert torch.equal(model(input_ids=ids, position_ids=positions, use_cache=False).logits, expected)


def test_a_given_mask_of_four_axes_is_refused_under_never() -> None:
    model, ids = sliding_model("mistral"), ids_of(50)
    mask = torch.zeros(1, 1, 50, 50, dtype=torch.float64)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with sparse_prefill(model, "full", fallback="never", **BLOCKS), pytest.raises(UsageError, match="four axes"):
            model(input_ids=ids, attention_mask=mask)
        with sparse_prefill(model, "full", **BLOCKS):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_measures_of_sliding_layers_know_the_window() -> None:
    """What a full pattern keeps there is all attention, at the density that its prefill records."""
    model, ids = sliding_model(), ids_of(90)
    found: dict[int, tuple[float, float]] = {}

    def on_layer(layer: int, layout: Layout, query: Tensor, key: Tensor, scale: float) -> None:
        plan = build_plan(parse_pattern("full"), layout, **BLOCKS, query=query, key=key, scale=scale)
        mass = block_mass(query, key, layout, scale=scale, **BLOCKS)
        kept = kept_mass(mass, plan, len(key))
        found[layer] = (float(kept.pattern.sum(axis=1).mean()), float(kept.density.mean()))

    with observed(model, on_layer) as state, torch.no_grad():
        model(input_ids=ids)
        assert state.own_masks == []
    with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse, torch.no_grad():
        model(input_ids=ids)
        recorded = [record.density for record in sparse.report()]
    assert found[0] == pytest.approx((1.0, recorded[0]), abs=1e-6)
    assert found[1] == pytest.approx((1.0, 1.0), abs=1e-6)
