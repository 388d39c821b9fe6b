"""DINO, iBOT and KoLeo against lightly (MIT), in float32: values and gradients within 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.oracles import oracle
from unclipped.objectives.dino_losses import Centre, dino_loss, ibot_loss, koleo_loss

STUDENT, TEACHER = 0.1, 0.04
"""Temperatures."""


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def assert_equal_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert_close(found, expected)
    for own, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert_close(own, theirs)


@pytest.mark.parametrize("num_local", [0, 1, 8])
def test_dino_and_its_centre_over_three_steps(num_local: int) -> None:
    theirs = oracle("lightly.loss.dino_loss").DINOLoss(output_dim=24, student_temp=STUDENT, center_momentum=0.9)
    centre = Centre(24, momentum=0.9)
    for _ in range(3):
        teacher = torch.rand(2, 6, 24) * 2 - 1
        views = [(torch.rand(count, 6, 24) * 2 - 1).requires_grad_() for count in (2, num_local)]
        expected = theirs(list(teacher), [*views[0], *views[1]], teacher_temp=TEACHER)
        targets = centre.targets(teacher.flatten(0, 1), TEACHER).unflatten(0, (2, 6))
        found = dino_loss(targets, views[0], views[1], STUDENT)
        assert_equal_with_gradients(found, expected, views[: 1 + (num_local > 0)])
        centre.update()
        assert_close(centre.mean, theirs.center.flatten())
    assert centre.mean.abs().max() > 0.02


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_ibot_and_its_centre_over_three_steps(share: float) -> None:
    theirs = oracle("lightly.loss.ibot_loss").IBOTPatchLoss(output_dim=24, teacher_temp=TEACHER, student_temp=STUDENT)
    centre = Centre(24, momentum=0.9)
    for _ in range(3):
        mask = torch.rand(4, 3, 5) < share
        mask[0, 0, 0] = True  # at least one patch, so that there is a centre
        mask[1] = False  # and an image without any
        teacher, student = torch.rand(2, int(mask.sum()), 24).mul(2).sub(1).unbind()
        student.requires_grad_()
        expected = theirs(teacher, student, mask, teacher_temp=TEACHER)
        found = ibot_loss(centre.targets(teacher, TEACHER), student, mask.flatten(1), STUDENT)
        assert_equal_with_gradients(found, expected, [student])
        centre.update()
        assert_close(centre.mean, theirs.center.value.flatten())


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize(("batch", "width"), [(2, 5), (16, 8), (100, 32)])
def test_koleo(batch: int, width: int, chunk: int) -> None:
    features = torch.randn(batch, width, requires_grad=True)
    expected = oracle("lightly.loss.koleo_loss").KoLeoLoss()(features)
    assert_equal_with_gradients(koleo_loss(features, chunk), expected, [features])
