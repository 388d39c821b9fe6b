"""Every backend on every kind of batch, through transformers' interface, against attention in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function

from unclipped.attention import flex
from unclipped.attention.layout import Layout
from unclipped.attention.plan import build_plan
from unclipped.attention.sparse import BACKENDS, sparse_attention
from unclipped.attention.state import Prompt, SparseState, enter_state, leave_state
from unclipped.attention.syntax import parse_pattern
from unclipped.attention.transformers_interface import SparseMask, sparse_attention_forward, sparse_mask
from unclipped.core.errors import UsageError

BLOCKS: dict[str, int] = {"key_block": 8, "query_block": 16}
PATTERNS = (
    "full",
    "sink(3) + window(9)",
    "global_text + sink + window2d(1, 2)",
    "sink + window(2) + same_image & grid(3) + tiles(3, 3)",
    "per_layer(full | per_head(window(9) | global_text + sink))",
    "topk(2)",
    "mass(0.5, least=1, most=3, stride=4)",
    "vertical_slash(1, 2, probes=4)",
)
HEADS = ((4, 4), (4, 2), (4, 1))
WIDTH, SCALE, LAYER = 8, 0.4, 1
ONE_IMAGE = [0] * 5 + [1] * 70 + [0] * 16
TWO_IMAGES = [0] * 3 + [1] * 40 + [0] * 4 + [1] * 24 + [0] * 6


@dataclass(frozen=True)
class Situation:
    """A batch: rows with their layouts, padded on the left; queries from `offset` on; keys with `spare` places, without
    the `dropped` first ones."""

    layouts: tuple[Layout, ...]
    offset: int = 0
    spare: int = 0
    dropped: int = 0

    @property
    def length(self) -> int:
        return max(layout.length for layout in self.layouts)


IMAGE_ROW = Layout.from_token_types(ONE_IMAGE, [(1, 7, 10)])
IMAGES_ROW = Layout.from_token_types(TWO_IMAGES, [(2, 4, 5), (1, 6, 4)])
TEXT_ROW = Layout.from_token_types([0] * 61)
SITUATIONS = {
    "ragged": Situation((IMAGE_ROW,)),
    "padded, several images, text alone": Situation((IMAGE_ROW, IMAGES_ROW, TEXT_ROW)),
    "chunk": Situation((IMAGE_ROW, IMAGES_ROW), offset=39),
    "static cache": Situation((IMAGES_ROW, TEXT_ROW), spare=29),
    "two-way images": Situation((IMAGE_ROW.with_sight("images"), IMAGES_ROW.with_sight("images"))),
    "chunk of two-way images, static cache": Situation((IMAGES_ROW.with_sight("images"),), offset=22, spare=7),
    "sliding window, padded": Situation(tuple(row.with_sight("causal", 19) for row in (IMAGE_ROW, IMAGES_ROW))),
    "sliding window, two-way images": Situation((IMAGES_ROW.with_sight("images", 30),)),
    "sliding window, chunk, keys dropped": Situation((IMAGE_ROW.with_sight("causal", 21),), offset=45, dropped=25),
}
TRAINED = (
    "ragged", "padded, several images, text alone", "chunk", "two-way images", "sliding window, two-way images",
)  # fmt: skip


class Config:
    """What identifies a model under a pattern."""


def states_of(case: Situation, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, keys = len(case.layouts), case.length + case.spare - case.dropped
    shapes = ((batch, heads[0], case.length - case.offset, WIDTH), (batch, heads[1], keys, WIDTH))
    return [torch.randn(shapes[min(i, 1)], generator=generator).to(dtype) for i in range(3)]


def run(case: Situation, text: str, backend: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, H, Tq, d) as a model's layer gets it."""
    config = Config()
    state = SparseState(parse_pattern(text), "never", **BLOCKS, backend=backend)
    enter_state(config, state)
    try:
        window = case.layouts[0].window
        causal = tuple(layout.with_sight("causal") for layout in case.layouts)
        state.set_prompt(Prompt(causal, "generation"))
        padding = torch.zeros(len(case.layouts), key.shape[2] + case.dropped, dtype=torch.bool)
        image = torch.full(padding.shape, -1)
        for row, layout in enumerate(case.layouts):
            real = slice(case.length - layout.length, case.length)
            padding[row, real] = True
            image[row, real] = torch.from_numpy(layout.image.copy()).long()

        def own_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = causal_mask_function(batch, head, query, key)  # type: ignore[arg-type]
            if case.layouts[0].sight == "images":
                own, other = image[batch, query], image[batch, key]
                seen = seen | ((own == other) & (own >= 0))
            return seen & (key > query - window) if window else seen

        is_causal = case.layouts[0].sight == "causal" and not window
        mask = sparse_mask(
            batch_size=len(case.layouts),
            q_length=query.shape[2],
            kv_length=key.shape[2],
            q_offset=case.offset,
            kv_offset=case.dropped,
            mask_function=causal_mask_function if is_causal else own_mask,
            attention_mask=padding,
            config=config,
            device=query.device,
        )
        assert isinstance(mask, SparseMask)
        module = nn.Module()
        module.layer_idx = LAYER  # type: ignore[assignment]
        output, _ = sparse_attention_forward(module, query, key, value, mask, scaling=SCALE)
        assert state.records[LAYER].mode == "sparse"
        return output.transpose(1, 2)
    finally:
        leave_state(config)


def oracle(case: Situation, text: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In float64, row by row, from the mask of the row's whole plan; zero where there is no token."""
    pattern = parse_pattern(text).for_layer(LAYER)
    output = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for row, layout in enumerate(case.layouts):
        start = case.length - layout.length
        first = max(0, case.offset - start)
        dropped = (F.pad(s[row], (0, 0, case.dropped, 0)) for s in (key, value))
        keys, values = (s[:, start : case.length] for s in dropped)
        own = query[row, :, start + first - case.offset :]
        if pattern.is_dynamic:
            plan = build_plan(
                pattern, layout, **BLOCKS, query=own, key=keys, scale=SCALE, offset=first, stop=layout.length
            )
            mask = plan.element_mask()
        else:
            mask = build_plan(pattern, layout, **BLOCKS, key_heads=key.shape[1]).element_mask()[:, first:]
        for head in range(query.shape[1]):
            kv = head // group
            scores = own[head].double() @ keys[kv].double().T * SCALE
            allowed = mask[kv if len(mask) > 1 else 0]
            weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
            output[row, head, start + first - case.offset :] = weights @ values[kv].double()
    return output


def fit(text: str, key_heads: int) -> str:
    """Patterns for two key heads fit models of one as their last entry."""
    return text if key_heads > 1 else text.replace("per_head(window(9) | global_text + sink)", "global_text + sink")


def by_block_mask(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """What FlexAttention computes when compiled, from the block mask's lists and its element rule."""
    assert enable_gqa
    rows, columns = block_mask.BLOCK_SIZE
    zero = torch.zeros((), dtype=torch.int64)
    elements = block_mask.mask_mod(zero, zero, torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None])
    seen = []
    for counts, indices in (
        (block_mask.kv_num_blocks[0], block_mask.kv_indices[0]),
        (block_mask.full_kv_num_blocks[0], block_mask.full_kv_indices[0]),
    ):
        listed = torch.arange(indices.shape[-1]) < counts[..., None]  # (heads, query blocks, places)
        blocks = torch.zeros(listed.shape, dtype=torch.bool).scatter_(-1, indices.long(), listed)
        seen.append(blocks.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2))
    mask = (seen[0] & elements) | seen[1]
    mask = mask | ~mask.any(dim=-1, keepdim=True)  # fillers, whose outputs are dropped
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=scale, enable_gqa=True)


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buckets, and no compiler."""
    monkeypatch.setattr(flex, "compiled", lambda: by_block_mask)
    monkeypatch.setattr(flex, "BUCKET", 32)
    monkeypatch.setattr(flex, "SMALLEST_BLOCK", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # test_triton.py has its own
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.usefixtures("uncompiled_flex")
def test_forward(text: str, backend: str, name: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    case, text = SITUATIONS[name], fit(text, heads[1])
    states = states_of(case, heads, dtype)
    error = (run(case, text, backend, *states).double() - oracle(case, text, *states)).abs().max()
    assert float(error) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("text", [PATTERNS[2], PATTERNS[4], PATTERNS[5]])
def test_backward(text: str, backend: str, name: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    case, text = SITUATIONS[name], fit(text, heads[1])
    leaves = [s.requires_grad_() for s in states_of(case, heads, dtype)]
    own = run(case, text, backend, *leaves)
    upstream = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(own, leaves, upstream.to(dtype))
    wanted = torch.autograd.grad(oracle(case, text, *leaves), leaves, upstream.to(dtype).double())
    for gradient, expected in zip(gradients, wanted, strict=True):
        size = float(expected.abs().max())
        assert float((gradient - expected).abs().max()) < (1e-5 if dtype == torch.float32 else 2e-2) * max(1.0, size)


@pytest.mark.slow
@pytest.mark.skipif("UNCLIPPED_SLOW" not in os.environ, reason="compiles for a minute: set UNCLIPPED_SLOW=1")
def test_compiled_flex() -> None:
    """With the compiler, on blocks of its size: both rules for elements (causal, and a chunk's own)."""
    layout = Layout.from_token_types([0] * 40 + [1] * 600 + [0] * 33, [(1, 60, 10)])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, layout.length, 16, generator=generator) for h in (4, 2, 2))
    for offset in (0, 300):
        plan = build_plan(parse_pattern("sink + window(40) + window2d(3, 3)"), layout, offset=offset)
        states = (query[:, :, offset:], key, value)
        with torch.no_grad():
            own, wanted = (sparse_attention(*states, plan, scale=SCALE, backend=b) for b in ("flex", "reference"))
        assert torch.allclose(own, wanted, atol=1e-5)


def test_flex_says_what_it_cannot_do() -> None:
    plan = build_plan(parse_pattern("full"), TEXT_ROW)
    states = [torch.zeros(1, 2, TEXT_ROW.length, WIDTH) for _ in range(3)]
    with pytest.raises(UsageError, match="no gradients on a CPU"):
        sparse_attention(states[0].requires_grad_(), *states[1:], plan, scale=1.0, backend="flex")
    with pytest.raises(UsageError, match="use backend='gather' for others"):
        sparse_attention(*(s.detach().double() for s in states), plan, scale=1.0, backend="flex")
    small = build_plan(parse_pattern("full"), TEXT_ROW, **BLOCKS)
    with pytest.raises(UsageError, match="key blocks of a multiple of 128 tokens, found 8"):
        sparse_attention(*(s.detach() for s in states), small, scale=1.0, backend="flex")
