"""Our CPU form of Muon against torch's own, and what orthogonalising must do."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.training.muon import Muon, orthogonalise

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 99))
def test_singular_values_come_near_one_and_directions_stay(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    rank = min(rows, columns)
    values = torch.linspace(0.3, 1.0, rank)
    matrix = left[:, :rank] @ torch.diag(values) @ right[:, :rank].T
    result = orthogonalise(matrix[None], COEFFICIENTS, steps=5, epsilon=1e-7)[0]
    found = left[:, :rank].T @ result @ right[:, :rank]
    # Newton–Schulz acts on singular values alone: the same singular vectors, values between 0.6 and 1.3.
    assert torch.allclose(found, torch.diag(found.diagonal()), atol=1e-4)
    assert found.diagonal().min() > 0.6
    assert found.diagonal().max() < 1.3


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_agree_with_torch_to_bfloat16_precision(rule: str, nesterov: bool) -> None:
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 8), (8, 16), (16, 8), (12, 12)]]
    theirs = copy.deepcopy(ours)
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": rule, "nesterov": nesterov}
    optimizers = [Muon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()
    momenta = [
        [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]] for optimizer in optimizers
    ]
    for mine, torchs in zip(*momenta, strict=True):
        torch.testing.assert_close(mine, torchs)
