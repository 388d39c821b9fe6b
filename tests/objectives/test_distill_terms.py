"""Distillation terms against NumPy in float64, their invariances, gradients and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.core.errors import UsageError
from unclipped.objectives import distill_terms as terms

TERMS = {
    "features": terms.features,
    "direction": terms.direction,
    "amplitude": terms.amplitude,
    "relation": terms.relation,
}


def pair(seed: int = 0, images: int = 2, patches: int = 5, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, images, patches, width)
    student, teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher


def smooth_l1(difference: np.ndarray, beta: float) -> float:
    size = np.abs(difference)
    return float(np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta).mean())


def oracle(name: str, student: np.ndarray, teacher: np.ndarray) -> float:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).sum(-1, keepdims=True))

    if name == "features":
        centred = teacher - teacher.mean(-1, keepdims=True)
        return smooth_l1(student - centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5), 1.0)
    if name == "direction":
        return float(1 - (unit(student) * unit(teacher)).sum(-1).mean())
    if name == "amplitude":
        return smooth_l1(student - teacher, 0.001)
    gram = [np.einsum("bid,bjd->bij", unit(x), unit(x)) for x in (student, teacher)]
    return smooth_l1(gram[0] - gram[1], 0.001)


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 9999), patches=st.integers(1, 6), width=st.integers(2, 6))
def test_each_term_equals_its_formula(name: str, seed: int, patches: int, width: int) -> None:
    student, teacher = pair(seed, patches=patches, width=width)
    expected = oracle(name, student.numpy(), teacher.numpy())
    assert TERMS[name](student, teacher).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences_and_none_reach_the_teacher(name: str) -> None:
    student, teacher = pair(3)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: TERMS[name](s, teacher), (student,))
    teacher.requires_grad_()
    TERMS[name](student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["direction", "amplitude", "relation"])
def test_equal_features_cost_nothing(name: str) -> None:
    student, _ = pair()
    assert TERMS[name](student, student.clone()).item() == pytest.approx(0, abs=1e-12)


def test_features_cost_nothing_at_the_standardised_teacher() -> None:
    _, teacher = pair(width=8)
    target = torch.nn.functional.layer_norm(teacher, (8,))
    assert terms.features(target, teacher).item() == pytest.approx(0, abs=1e-12)


def test_direction_does_not_see_lengths_and_amplitude_does() -> None:
    student, teacher = pair()
    lengths = torch.rand(2, 5, 1, dtype=torch.float64) * 9 + 0.1
    torch.testing.assert_close(terms.direction(student * lengths, teacher), terms.direction(student, teacher))
    assert terms.amplitude(student * lengths, teacher) != terms.amplitude(student, teacher)


def test_relation_does_not_see_a_rotation() -> None:
    student, teacher = pair()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(terms.relation(student @ rotation, teacher), terms.relation(student, teacher))
    assert terms.relation(student @ rotation, student).item() == pytest.approx(0, abs=1e-12)


def test_relation_of_an_image_does_not_depend_on_its_neighbours() -> None:
    student, teacher = pair()
    alone = [terms.relation(student[i : i + 1], teacher[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(terms.relation(student, teacher), torch.stack(alone).mean())


@pytest.mark.parametrize("chunk", [1, 2, 5, 99])
def test_relation_in_chunks_is_the_same_loss_and_gradient(chunk: int) -> None:
    student, teacher = pair()
    whole, parts = student.clone().requires_grad_(), student.clone().requires_grad_()
    terms.relation(whole, teacher).backward()
    loss = terms.relation(parts, teacher, chunk=chunk)
    loss.backward()
    torch.testing.assert_close(loss.detach(), terms.relation(student, teacher))
    torch.testing.assert_close(parts.grad, whole.grad)


def test_relation_compares_widths_that_differ() -> None:
    student, _ = pair()
    wider = torch.cat([student, torch.zeros_like(student)], dim=-1)
    assert terms.relation(student, wider).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_bfloat16_features_give_a_float32_loss(name: str) -> None:
    student, teacher = (values.bfloat16() for values in pair())
    loss = TERMS[name](student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, TERMS[name](student.float(), teacher.float()))


def test_resizing_a_grid_averages_what_a_patch_covers_and_keeps_the_order() -> None:
    ramp = torch.arange(6, dtype=torch.float64).repeat_interleave(4).reshape(1, 24, 1)  # rows 0…5 of a 6×4 grid
    assert torch.equal(terms.resize_grid(ramp, (6, 4), (6, 4)), ramp)
    smaller = terms.resize_grid(ramp, (6, 4), (3, 2)).reshape(3, 2)
    assert torch.equal(smaller[:, 0], smaller[:, 1])
    assert smaller[1, 0].item() == pytest.approx(2.5)
    assert smaller[0, 0] < smaller[1, 0] < smaller[2, 0]
    constant = torch.full((1, 24, 3), 7.0)
    torch.testing.assert_close(terms.resize_grid(constant, (6, 4), (5, 7)), torch.full((1, 35, 3), 7.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: terms.direction(torch.zeros(1, 4, 3), torch.zeros(1, 4, 5)), "project the student"),
        (lambda: terms.amplitude(torch.zeros(1, 4, 3), torch.zeros(1, 9, 3)), "resize the teacher's grid"),
        (lambda: terms.features(torch.zeros(2, 3), torch.zeros(3, 3)), "one shape"),
        (lambda: terms.relation(torch.zeros(1, 4, 3), torch.zeros(1, 9, 3)), "same patches"),
        (lambda: terms.relation(torch.zeros(4, 3), torch.zeros(4, 3)), "images, patches, width"),
        (lambda: terms.resize_grid(torch.zeros(1, 7, 3), (2, 3), (1, 1)), "2×3 holds no 7"),
    ],
)
def test_bad_shapes_are_named(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
