"""InfoNCE and the pairwise sigmoid against NumPy in float64, in chunks, and over processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unclipped.objectives.exchange import gather_rows, pass_on
from unclipped.objectives.pair_losses import clamp_log_scale, info_nce, sigmoid_loss, unit

Loss = Callable[..., Tensor]


def pairs(batch: int, width: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images, texts = random.normal(size=(2, batch, width))
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))  # type: ignore[return-value]


def numpy_info_nce(images: np.ndarray, texts: np.ndarray, scale: float) -> float:
    scores = scale * images @ texts.T
    both = []
    for table in (scores, scores.T):
        probabilities = np.exp(table - table.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        both.append(-np.log(np.diag(probabilities)).mean())
    return sum(both) / 2


def numpy_sigmoid(images: np.ndarray, texts: np.ndarray, scale: float, bias: float) -> float:
    signs = 2 * np.eye(len(images)) - 1
    return np.log1p(np.exp(-signs * (scale * images @ texts.T + bias))).sum() / len(images)


def tensors(*values: Any, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[Tensor]:
    return [torch.tensor(value, dtype=dtype, requires_grad=requires_grad) for value in values]


@pytest.mark.parametrize("chunk", [None, 1, 3, 8, 20])
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_equal_numpy(batch: int, chunk: int | None, dtype: torch.dtype) -> None:
    images, texts = pairs(batch)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    x, y, scale, bias = tensors(images, texts, [math.log(14.0)], [-3.0], dtype=dtype)
    assert float(info_nce(x, y, scale, chunk=chunk)) == pytest.approx(
        numpy_info_nce(images, texts, 14.0), abs=tolerance
    )
    found = float(sigmoid_loss(x, y, scale, bias, chunk=chunk))
    assert found == pytest.approx(numpy_sigmoid(images, texts, 14.0, -3.0), rel=tolerance)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.floats(0.1, 100.0), st.integers(0, 1000))
def test_any_chunk_gives_the_loss_and_gradients_of_the_whole(batch: int, chunk: int, scale: float, seed: int) -> None:
    images, texts = pairs(batch, seed=seed)
    for loss in (info_nce, sigmoid_loss):
        found = []
        for size in (None, chunk):
            values = tensors(images, texts, [math.log(scale)], requires_grad=True)
            values += tensors([-10.0], requires_grad=True) if loss is sigmoid_loss else []
            value = loss(*values, chunk=size)
            found.append([value, *torch.autograd.grad(value, values)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients(chunk: int | None) -> None:
    images, texts = pairs(3, width=2)
    values = tensors(images, texts, [0.7], requires_grad=True)
    assert torch.autograd.gradcheck(lambda *v: info_nce(*v, chunk=chunk), values)
    values += tensors([-1.0], requires_grad=True)
    assert torch.autograd.gradcheck(lambda *v: sigmoid_loss(*v, chunk=chunk), values)


@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
def test_what_chunks_keep_for_the_backward_pass_grows_with_the_batch_and_not_with_its_square(loss: Loss) -> None:
    def kept(batch: int, chunk: int | None) -> int:
        values = tensors(*pairs(batch), [1.0], requires_grad=True)
        values += tensors([-10.0], requires_grad=True) if loss is sigmoid_loss else []
        places: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            places[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = loss(*values, chunk=chunk)
        assert result.requires_grad
        return sum(places.values())

    assert kept(256, None) > 256 * 256
    assert kept(256, 16) < 40 * 256


def test_the_symmetric_loss_does_not_care_which_side_is_which_or_in_what_order() -> None:
    images, texts, scale = tensors(*pairs(6), [2.0])
    loss = info_nce(images, texts, scale)
    torch.testing.assert_close(info_nce(texts, images, scale), loss)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(info_nce(images[order], texts[order], scale), loss)


def test_equal_embeddings_cannot_be_told_apart() -> None:
    same = torch.ones(7, 4) / 2
    assert float(info_nce(same, same, torch.zeros(1))) == pytest.approx(math.log(7), rel=1e-6)


def test_a_batch_of_one_has_nothing_to_find() -> None:
    one, other, scale = tensors(*pairs(1), [2.0])
    assert float(info_nce(one, other, scale)) == 0.0


@pytest.mark.parametrize("chunk", [None, 2])
def test_autocast_does_not_round_the_comparison(chunk: int | None) -> None:
    images, texts = pairs(6, width=32)
    x, y, scale, bias = tensors(images, texts, [math.log(100.0)], [-10.0], dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [info_nce(unit(x), unit(y), scale, chunk=chunk), sigmoid_loss(x, y, scale, bias, chunk=chunk)]
    sum(losses).backward()
    assert losses[0].item() == pytest.approx(numpy_info_nce(images, texts, 100.0), rel=1e-4)
    assert losses[1].item() == pytest.approx(numpy_sigmoid(images, texts, 100.0, -10.0), rel=1e-4)


def test_the_scale_is_held_at_a_hundred() -> None:
    for value, expected in ((3.0, math.exp(3.0)), (9.0, 100.0)):
        scale = nn.Parameter(torch.tensor([value]))
        clamp_log_scale(scale)
        assert scale.exp().item() == pytest.approx(expected, rel=1e-5)


def test_without_processes_nothing_is_exchanged() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows
    assert pass_on(rows) is rows


def _process(rank: int, folder: str, processes: int, images: Tensor, texts: Tensor, chunk: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    own = len(images) // processes
    part = slice(rank * own, (rank + 1) * own)
    found: dict[str, list[Tensor]] = {}
    for name, loss in (("info_nce", info_nce), ("sigmoid", sigmoid_loss)):
        values = [x.clone().requires_grad_() for x in (images[part], texts[part])]
        values += tensors([1.3], requires_grad=True)
        values += tensors([-2.0], requires_grad=True) if loss is sigmoid_loss else []
        value = loss(*values, chunk=chunk)
        found[name] = [value.detach(), *torch.autograd.grad(value, values)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("processes", "chunk"), [(2, None), (2, 2), (3, None)])
def test_several_processes_equal_one_on_the_joined_batch(processes: int, chunk: int | None, tmp_path: Path) -> None:
    images, texts = tensors(*pairs(6))
    arguments = (str(tmp_path), processes, images, texts, chunk)
    mp.start_processes(_process, args=arguments, nprocs=processes, start_method="fork")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name, loss in (("info_nce", info_nce), ("sigmoid", sigmoid_loss)):
        values = [x.clone().requires_grad_() for x in (images, texts)]
        values += tensors([1.3], requires_grad=True)
        values += tensors([-2.0], requires_grad=True) if loss is sigmoid_loss else []
        whole = loss(*values)
        expected = torch.autograd.grad(whole, values)
        found = [part[name] for part in parts]
        torch.testing.assert_close(sum(part[0] for part in found) / processes, whole.detach())
        for place in (0, 1):  # a process's embeddings: what data parallelism averages is their gradient over W
            gradient = torch.cat([part[1 + place] for part in found]) / processes
            torch.testing.assert_close(gradient, expected[place])
        for place in range(2, len(values)):
            torch.testing.assert_close(sum(part[1 + place] for part in found) / processes, expected[place])
