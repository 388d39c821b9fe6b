"""What a backend cannot take: dense with its reason recorded, or an error. Fake tensors stand for those of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attention.test_prefill import text_inputs, text_model
from unclipped.attention import sparse
from unclipped.attention.layout import Layout
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.sparse import reason_against
from unclipped.attention.state import PrefillRows, Row, SparseState
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError

TOKENS = 8192
ROWS = PrefillRows((Row(0, Layout.from_token_types([0] * TOKENS), 0, TOKENS, TOKENS),))

# backend (None: the one chosen by itself), what the states are, key block, what is said.
LIMITS = [
    ("triton", {"dtype": torch.float64}, 128, "takes float32, bfloat16 or float16, the same for all, found float64"),
    ("triton", {}, 72, "takes key blocks of a multiple of 16 tokens, found 72"),
    ("triton", {"width": 264}, 128, "takes heads of at most 256, found 264"),
    ("flex", {"dtype": torch.float64}, 128, "takes float32, bfloat16 or float16, the same for all, found float64"),
    ("flex", {}, 64, "takes key blocks of a multiple of 128 tokens, found 64"),
    ("flex", {"width": 8}, 128, "takes heads of at least 16 on CUDA, found 8"),
    (None, {"dtype": torch.float64}, 128, "backend flex takes float32, bfloat16 or float16"),
    (None, {}, 64, "backend flex takes key blocks of a multiple of 128 tokens, found 64"),
    ("triton", {"value_width": 32}, 128, "values of the shape of the keys"),
    ("reference", {"value_width": 32}, 128, "values of the shape of the keys"),
]


def states(
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, width: int = 64, value_width: int | None = None
) -> list[Tensor]:
    """Query, key and value of one row on a device that need not be there."""
    shapes = ((4, width), (2, width), (2, value_width or width))
    return [torch.empty(1, heads, TOKENS, size, device=device, dtype=dtype) for heads, size in shapes]


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "find_spec", lambda name: object())


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(("backend", "given", "key_block", "message"), LIMITS)
def test_dense_with_its_reason_on_cuda(backend: str | None, given: dict, key_block: int, message: str) -> None:
    blocks = {"key_block": key_block, "query_block": 2 * key_block}
    with FakeTensorMode():
        query, key, value = states(**given)
        state = SparseState(parse_pattern("window(512)"), "auto", **blocks, backend=backend)
        assert state.attend(query, key, value, ROWS, layer=3, scale=0.1, dropout=0.0) is None
        record = state.records[3]
        assert (record.mode, record.density) == ("dense", 1.0)
        assert message in str(record.reason)
        state = SparseState(parse_pattern("window(512)"), "never", **blocks, backend=backend)
        with pytest.raises(UsageError, match=r"cannot run in layer 3: .*\(fallback='never'\)") as caught:
            state.attend(query, key, value, ROWS, layer=3, scale=0.1, dropout=0.0)
        assert message in str(caught.value)
        assert not state.records


@pytest.mark.parametrize("backend", ["gather", "triton", "flex", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_backends_take(backend: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        assert reason_against(backend, *states(dtype=dtype), key_block=128, scale=0.1) is None


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_float64_and_any_block_run_elsewhere(backend: str) -> None:
    with FakeTensorMode():
        given = states("cpu", torch.float64, width=8)
        assert reason_against(backend, *given, key_block=7, scale=0.1) is None


def test_flex_on_a_cpu_has_no_gradients() -> None:
    with FakeTensorMode():
        query, key, value = states("cpu")
        assert reason_against("flex", query, key, value, key_block=128, scale=0.1) is None
        found = reason_against("flex", query, key.requires_grad_(), value, key_block=128, scale=0.1)
        assert found == "backend flex computes no gradients on a CPU; train with backend='gather'"
        query, key, value = states("cuda")
        assert reason_against("flex", query, key.requires_grad_(), value, key_block=128, scale=0.1) is None


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("flex", lambda model: model, "key blocks of a multiple of 128 tokens, found 8"),
        ("triton", lambda model: model.double(), "the same for all, found float64"),
    ],
)
def test_a_whole_model_runs_dense_and_says_why(backend: str, change: Callable, message: str) -> None:
    model, inputs = change(text_model("qwen3")), text_inputs()
    blocks = {"key_block": 8, "query_block": 16}
    expected = model(**inputs).logits
    with sparse_prefill(model, "window(8)", backend=backend, **blocks) as held, torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        assert {record.mode for record in held.report()} == {"dense"}
        assert message in str(held.report()[0].reason)
    with (
        sparse_prefill(model, "window(8)", fallback="never", backend=backend, **blocks),
        pytest.raises(UsageError, match=message),
    ):
        model(**inputs)
