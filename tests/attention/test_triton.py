"""The Triton kernels against attention in float64: on a GPU where there is one, else step by step in the interpreter
(`TRITON_INTERPRET=1 pytest tests/attention/test_triton.py`)."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attention.cases import attention64
from attention.test_matrix import SCALE, SITUATIONS, TRAINED, fit, oracle, run, states_of
from unclipped.attention import triton_backend
from unclipped.attention.layout import Layout
from unclipped.attention.plan import BlockPlan, build_plan
from unclipped.attention.sparse import default_backend, sparse_attention
from unclipped.attention.syntax import parse_pattern
from unclipped.attention.triton_backend import PlanTables, tables_of, triton_attention_and_sums
from unclipped.core.errors import UsageError

BLOCKS: dict[str, int] = {"key_block": 16, "query_block": 32}
HEADS = ((4, 4), (4, 2), (3, 1))
LAYOUT = Layout.from_token_types([0] * 5 + [1] * 70 + [0] * 9 + [1] * 40 + [0] * 7, [(1, 7, 10), (2, 4, 5)])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def why_not() -> str | None:
    """Why the kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (CPU builds of torch come without it)"
    if torch.cuda.is_available() and not triton_backend.is_interpreted():
        return None
    if not triton_backend.is_interpreted():
        return "no GPU: set TRITON_INTERPRET=1 to run the kernels on the CPU"
    try:
        int(np.zeros(1))  # what the interpreter of Triton 3.6 does with loop bounds
    except TypeError:
        return f"Triton's interpreter needs NumPy below 2.4, found {np.__version__}"
    return None


REASON = why_not()
runs = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DEVICE = "cuda" if REASON is None and not triton_backend.is_interpreted() else "cpu"


def states(heads: tuple[int, int], length: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, length, width, generator=generator).to(DEVICE, dtype) for h in (heads[0], *heads[1:] * 2)]


def expected(leaves: list[Tensor], plan: BlockPlan, scale: float, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in float64 from the plan's mask, element by element."""
    exact = [s.detach().cpu().double().requires_grad_() for s in leaves]
    query, key, value = (s[0] for s in exact)
    group, mask = len(query) // len(key), plan.element_mask()
    outputs = []
    for head, own in enumerate(query):
        allowed = mask[head // group if len(mask) > 1 else 0]
        scores = (own @ key[head // group].T * scale).masked_fill(~allowed, float("-inf"))
        outputs.append(scores.softmax(dim=-1) @ value[head // group])
    output = torch.stack(outputs)[None]
    return output.detach(), list(torch.autograd.grad(output, exact, upstream.cpu().double()))


def check(leaves: list[Tensor], plan: BlockPlan, scale: float) -> None:
    """Forward and backward within the tolerance of the type, relative to the largest gradient."""
    limit = TOLERANCE[leaves[0].dtype]
    leaves = [s.requires_grad_() for s in leaves]
    output = sparse_attention(leaves[0], leaves[1], leaves[2], plan, scale=scale, backend="triton")
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = torch.autograd.grad(output, leaves, upstream)
    wanted, wanted_gradients = expected(leaves, plan, scale, upstream)
    assert output.dtype == leaves[0].dtype
    assert float((output.detach().cpu() - wanted).abs().max()) < limit
    for leaf, gradient, want in zip(leaves, gradients, wanted_gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert float((gradient.cpu() - want).abs().max()) < limit * max(1.0, float(want.abs().max()))


@runs
@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa of 3"])
@pytest.mark.parametrize("text", ["full", "sink(3) + window(9)", "global_text + sink + window2d(1, 2)", "topk(2)"])
def test_patterns_and_heads(text: str, heads: tuple[int, int]) -> None:
    leaves = states(heads, LAYOUT.length, 16, torch.float32)
    plan = build_plan(parse_pattern(text), LAYOUT, **BLOCKS, query=leaves[0][0], key=leaves[1][0], scale=SCALE)
    check(leaves, plan, SCALE)


@runs
@pytest.mark.parametrize(("sight", "window", "offset"), [("causal", 21, 0), ("images", 30, 0), ("causal", 11, 39)])
def test_sliding_windows(sight: str, window: int, offset: int) -> None:
    """The border of the window is exact inside its blocks, forward and backward."""
    layout = LAYOUT.with_sight(sight, window)  # type: ignore[arg-type]
    leaves = states((4, 2), layout.length, 16, torch.float32)
    leaves[0] = leaves[0][:, :, offset:]
    for text in ("full", "sink(3) + window(9)"):
        check(leaves, build_plan(parse_pattern(text), layout, **BLOCKS, offset=offset), SCALE)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype: torch.dtype) -> None:
    leaves = states((4, 2), LAYOUT.length, 16, dtype)
    check(leaves, build_plan(parse_pattern("sink(3) + window2d(2, 3)"), LAYOUT, **BLOCKS), SCALE)


@runs
@pytest.mark.parametrize("width", [8, 64, 80, 96, 128, 256])
def test_head_sizes(width: int) -> None:
    """Sizes that are no power of two are filled up inside the kernels."""
    layout = Layout.from_token_types([0] * 53)
    leaves = states((2, 1), layout.length, width, torch.float32)
    check(leaves, build_plan(parse_pattern("sink + window(6)"), layout, **BLOCKS), width**-0.5)


@runs
@pytest.mark.parametrize("length", [1, 15, 16, 33, 64])
@pytest.mark.parametrize("sight", ["causal", "all"])
def test_lengths_and_sight(length: int, sight: str) -> None:
    """Rows shorter than a block, of whole blocks, and with a key more; encoders attend both ways."""
    layout = Layout.from_token_types([0] + [1] * (length - 1), sight=sight)  # type: ignore[arg-type]
    check(states((2, 1), length, 16, torch.float32), build_plan(parse_pattern("window(7)"), layout, **BLOCKS), SCALE)


@runs
@pytest.mark.parametrize("blocks", [(48, 96), (16, 16), (64, 128)])
def test_blocks_of_other_sizes(blocks: tuple[int, int]) -> None:
    """Blocks that are no power of two are walked in tiles that divide them."""
    plan = build_plan(parse_pattern("window(30)"), LAYOUT, key_block=blocks[0], query_block=blocks[1])
    check(states((3, 1), LAYOUT.length, 16, torch.float32), plan, SCALE)


@runs
@pytest.mark.parametrize("sight", ["causal", "images"])
@pytest.mark.parametrize(("offset", "stop"), [(39, 131), (64, 100), (7, 30)])
def test_chunks(offset: int, stop: int, sight: str) -> None:
    """Queries from the middle of a block on, with all keys before them; images may see themselves both ways."""
    layout = LAYOUT.with_sight(sight)  # type: ignore[arg-type]
    plan = build_plan(parse_pattern("sink + window2d(1, 2)"), layout, **BLOCKS, offset=offset, stop=stop)
    query, key, value = states((4, 2), stop, 16, torch.float32)
    check([query[:, :, offset:].contiguous(), key, value], plan, SCALE)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("text", ["per_layer(full | per_head(window(9) | global_text + sink))", "topk(2)"])
def test_batches_as_a_model_gives_them(
    text: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows, left padding, several images, chunks and static caches, through transformers' interface."""
    if DEVICE != "cpu":
        pytest.skip("its blocks of 8 keys are smaller than a tensor core's: for the interpreter")
    monkeypatch.setattr(triton_backend, "SMALLEST_BLOCK", 8)
    case, text = SITUATIONS[name], fit(text, 2)
    leaves = [s.requires_grad_(name in TRAINED) for s in states_of(case, (4, 2), dtype)]
    output, wanted = run(case, text, "triton", *leaves), oracle(case, text, *leaves)
    limit = TOLERANCE[dtype]
    assert float((output.detach().double() - wanted.detach()).abs().max()) < limit
    if name not in TRAINED:
        return
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, leaves, upstream.to(dtype))
    wanted_gradients = torch.autograd.grad(wanted, leaves, upstream.to(dtype).double())
    for gradient, want in zip(gradients, wanted_gradients, strict=True):
        assert float((gradient - want).abs().max()) < limit * max(1.0, float(want.abs().max()))


@runs
def test_states_in_any_order_of_axes() -> None:
    """Models hand over views of (1, N, H, d), and gradients that are expanded."""
    leaves = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in states((4, 2), LAYOUT.length, 16, torch.float32)]
    assert not leaves[0].is_contiguous()
    plan = build_plan(parse_pattern("window(20)"), LAYOUT, **BLOCKS)
    check(leaves, plan, SCALE)
    query = leaves[0].detach().requires_grad_()
    output = sparse_attention(query, leaves[1].detach(), leaves[2].detach(), plan, scale=SCALE, backend="triton")
    (gradient,) = torch.autograd.grad(output.sum(), query)
    _, wanted = expected([query, *leaves[1:]], plan, SCALE, torch.ones_like(output))
    assert float((gradient.cpu() - wanted[0]).abs().max()) < 1e-5


@runs
def test_sums_and_large_scores() -> None:
    """The log-sum-exp, where plain exponentials overflow."""
    query, key, value = states((2, 1), 70, 16, torch.float32)
    query = query * 40
    plan = build_plan(parse_pattern("window(20)"), Layout.from_token_types([0] * 70), **BLOCKS)
    output, sums = triton_attention_and_sums(query, key, value, plan, scale=1.0)
    scores = (query[0].double() @ key[0].double().transpose(1, 2)).cpu()  # (H, N, N)
    assert float(scores.max()) > 400
    wanted = scores.masked_fill(~plan.element_mask(), float("-inf")).logsumexp(dim=-1)
    assert float((sums[0].cpu() - wanted).abs().max()) < 1e-3
    mask = plan.element_mask().numpy()
    exact = attention64(*(s[0].cpu().numpy() for s in (query, key, value)), mask, 1.0)  # type: ignore[arg-type]
    assert np.abs(output[0].cpu().numpy() - exact).max() < 1e-4


@runs
def test_a_later_token_changes_nothing_and_runs_repeat() -> None:
    leaves = states((4, 2), LAYOUT.length, 16, torch.float32)
    changed = [s.clone() for s in leaves]
    for one in changed:
        one[:, :, 77:] += 3.0
    plan = build_plan(parse_pattern("global_text + sink + window(20)"), LAYOUT, **BLOCKS)
    first, again, other = (
        sparse_attention(s[0], s[1], s[2], plan, scale=SCALE, backend="triton") for s in (leaves, leaves, changed)
    )
    assert torch.equal(first, again)
    assert torch.equal(first[:, :, :77], other[:, :, :77])
    assert not torch.equal(first, other)


def test_tables_say_what_the_plan_says() -> None:
    """Lists, those behind the mask, and both transposed, against the plan's own element mask."""
    pattern = parse_pattern("per_head(window(9) | global_text + sink)")
    for sight, offset, window in (
        ("causal", 0, 0), ("images", 0, 0), ("causal", 39, 0), ("all", 0, 0), ("causal", 39, 21), ("images", 0, 30),
    ):  # fmt: skip
        layout = LAYOUT.with_sight(sight, window)  # type: ignore[arg-type]
        plan = build_plan(pattern, layout, **BLOCKS, key_heads=2, offset=offset)
        tables = PlanTables(plan, torch.device("cpu"))
        keys = torch.arange(layout.length)[None]
        seen = (keys >= plan.begin[:, None]) & (keys <= plan.reach[:, None])
        size, before = plan.query_block, plan.offset - plan.first_block * plan.query_block
        masks = []
        for by_key, pair in ((False, (tables.whole, tables.masked)), (True, tables.by_key)):
            mask = torch.zeros(2, plan.blocks * size, tables.key_blocks * plan.key_block, dtype=torch.bool)
            for is_masked, lists in enumerate(pair):
                rows = tables.key_blocks if by_key else plan.blocks
                for head in range(2):
                    for row in range(rows):
                        start, stop = lists.starts[head * rows + row : head * rows + row + 2].tolist()
                        for other in lists.blocks[start:stop].tolist():
                            q, k = (other, row) if by_key else (row, other)
                            part = mask[head, q * size : (q + 1) * size, k * plan.key_block : (k + 1) * plan.key_block]
                            part |= True
                if not is_masked:
                    whole = mask.clone()
            cut = slice(before, before + layout.length - offset)
            whole, mask = whole[:, cut, : layout.length], mask[:, cut, : layout.length]
            masks.append(whole | (mask & seen))
            assert torch.equal(masks[-1], plan.element_mask())
        assert torch.equal(*masks)


def test_tables_are_kept_with_the_plan_and_go_with_it() -> None:
    plan = build_plan(parse_pattern("window(9)"), LAYOUT, **BLOCKS)
    device, before = torch.device("cpu"), len(triton_backend._TABLES)
    assert tables_of(plan, device) is tables_of(plan, device)
    assert len(triton_backend._TABLES) == before + 1
    del plan
    gc.collect()
    assert len(triton_backend._TABLES) == before


def test_chosen_by_itself_on_cuda_only() -> None:
    has_triton = importlib.util.find_spec("triton") is not None
    assert default_backend("cpu") == "gather"
    assert default_backend("cuda") == ("flex" if has_triton else "reference")
    assert default_backend("mps") == "reference"


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    plan = build_plan(parse_pattern("window(9)"), LAYOUT, **BLOCKS)
    with pytest.raises(UsageError, match=r"Triton is not installed .* install a CUDA build of torch"):
        sparse_attention(*(torch.zeros(1, 2, 131, 8) for _ in range(3)), plan, scale=1.0, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpret": "0"}, "runs on CUDA devices, the queries are on cpu"),
        ({"dtype": torch.float64}, "takes float32, bfloat16 or float16, the same for all, found float64"),
        ({"width": 264}, "heads of at most 256, found 264"),
        ({"key_block": 8}, "multiple of 16 tokens, found 8"),
        ({"scale": 0.0}, "scale must be above 0, found 0"),
    ],
)
def test_bad_input(change: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", change.get("interpret", "1"))
    plan = build_plan(parse_pattern("window(9)"), LAYOUT, key_block=change.get("key_block", 16), query_block=32)
    shape = (1, 2, LAYOUT.length, change.get("width", 8))
    filled = [torch.zeros(shape, dtype=change.get("dtype", torch.float32)) for _ in range(3)]
    with pytest.raises(UsageError, match=message):
        sparse_attention(*filled, plan, scale=change.get("scale", 1.0), backend="triton")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("width", [64, 128])
def test_kernels_compile_for_a_gpu_that_is_not_there(width: int, tmp_path: Path) -> None:
    """For sm_90: they fit its shared memory (227 KiB a block) and spill next to nothing."""
    script = Path(__file__).resolve().parents[1] / "support" / "compile_triton.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(script), str(width), "bf16"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = {line["kernel"]: line for line in map(json.loads, said.splitlines())}
    assert set(found) == {"forward", "query_gradient", "key_gradient", "delta"}
    for line in found.values():
        assert line["shared"] <= 227 * 1024
        assert line["spills"] <= 128


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device and Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2)])
def test_on_a_gpu(heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    """With the tiles and blocks of real use."""
    layout = Layout.from_token_types([0] * 40 + [1] * 960 + [0] * 33, [(1, 32, 30)])
    leaves = states(heads, layout.length, width, dtype)
    check(leaves, build_plan(parse_pattern("sink + window(40) + window2d(3, 3)"), layout), width**-0.5)
