"""DINOv2's losses and centring against NumPy in float64, and over two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from unclipped.core.errors import UsageError
from unclipped.objectives.dino_heads import DinoHead
from unclipped.objectives.dino_losses import Centre, cross_entropy, dino_loss, ibot_loss, koleo_loss, sinkhorn
from unclipped.objectives.schedules import cosine, linear

RANDOM = np.random.default_rng(0)


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def targets(*shape: int) -> np.ndarray:
    return np.exp(log_softmax(RANDOM.normal(size=shape)))


def numpy_sinkhorn(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    q = np.exp(scores / temperature)
    samples, prototypes = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=0, keepdims=True) * prototypes
        q /= q.sum(axis=1, keepdims=True) * samples
    return q * samples


@pytest.mark.parametrize("num_local", [0, 3])
def test_dino_equals_the_sum_over_pairs(num_local: int) -> None:
    t, g, loc = targets(2, 4, 6), RANDOM.normal(size=(2, 4, 6)), RANDOM.normal(size=(num_local, 4, 6))
    terms = [-(t[i] * log_softmax(g[1 - i] / 0.1)).sum(-1).mean() for i in range(2)]
    terms += [-(t[i] * log_softmax(loc[j] / 0.1)).sum(-1).mean() for i in range(2) for j in range(num_local)]
    for dtype in (torch.float64, torch.float32):
        found = dino_loss(*(torch.tensor(v, dtype=dtype) for v in (t, g, loc)), 0.1)
        assert float(found) == pytest.approx(sum(terms) / (2 + 2 * num_local), rel=1e-5)


def test_ibot_keeps_unmasked_images_in_the_denominator() -> None:
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=bool)
    t, s = targets(4, 5), RANDOM.normal(size=(4, 5))
    per_patch = -(t * log_softmax(s / 0.1)).sum(-1)
    expected = (per_patch[:3].mean() + 0.0 + per_patch[3]) / 3
    found = ibot_loss(torch.tensor(t), torch.tensor(s), torch.tensor(mask), 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_ibot_without_any_masked_patch_is_zero() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = ibot_loss(torch.zeros(0, 5), empty, torch.zeros(3, 4, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_koleo_equals_numpy(chunk: int) -> None:
    x = RANDOM.normal(size=(7, 5))
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(z[:, None] - z[None], axis=-1) + np.diag(np.full(7, np.inf))
    expected = -np.log(distance.min(axis=1) + 1e-8).mean()
    assert float(koleo_loss(torch.tensor(x), chunk)) == pytest.approx(expected, rel=1e-9)


def test_koleo_of_equal_features_is_finite() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_koleo_refuses_a_single_image() -> None:
    with pytest.raises(UsageError, match=r"at least two images in a micro-batch.*found 1.*koleo_weight"):
        koleo_loss(torch.ones(1, 4))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_numpy(iterations: int) -> None:
    scores = RANDOM.uniform(-1, 1, size=(9, 6))
    expected = numpy_sinkhorn(scores, 0.05, iterations)
    np.testing.assert_allclose(sinkhorn(torch.tensor(scores), 0.05, iterations).numpy(), expected, rtol=1e-9)
    single = sinkhorn(torch.tensor(scores, dtype=torch.float32), 0.05, iterations)
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-5)


def test_sinkhorn_stands_scores_that_overflow_an_exponential_and_empty_batches() -> None:
    found = sinkhorn(torch.tensor([[900.0, 0.0], [0.0, 900.0]]), 0.04)
    torch.testing.assert_close(found, torch.eye(2))
    assert sinkhorn(torch.zeros(0, 4), 0.04).shape == (0, 4)


def test_centre_is_the_running_mean_of_what_was_noted() -> None:
    centre, first, second = Centre(3, 0.9), RANDOM.normal(size=(4, 3)), RANDOM.normal(size=(2, 3))
    centre = centre.double()
    for scores in (first, second):
        found = centre.targets(torch.tensor(scores), 0.1)
        np.testing.assert_allclose(found.numpy(), np.exp(log_softmax(scores / 0.1)), rtol=1e-9)
    centre.update()
    expected = 0.1 * np.concatenate([first, second]).mean(axis=0)
    np.testing.assert_allclose(centre.mean.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(
        centre.targets(torch.tensor(first), 0.1).numpy(), np.exp(log_softmax((first - expected) / 0.1)), rtol=1e-9
    )


def test_gradients() -> None:
    t, mask = torch.tensor(targets(3, 5)), torch.tensor([[True, True], [False, True]])
    scores = torch.tensor(RANDOM.normal(size=(3, 5)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: cross_entropy(t, s, 0.5), (scores,))
    assert torch.autograd.gradcheck(lambda s: ibot_loss(t, s, mask, 0.5), (scores,))
    assert torch.autograd.gradcheck(koleo_loss, (scores,))
    views = torch.tensor(RANDOM.normal(size=(2, 3, 5)), requires_grad=True)
    local = torch.tensor(RANDOM.normal(size=(1, 3, 5)), requires_grad=True)
    both = torch.tensor(targets(2, 3, 5))
    assert torch.autograd.gradcheck(lambda g, loc: dino_loss(both, g, loc, 0.5), (views, local))


def test_head_scores_are_cosines_times_gains_and_frozen_prototypes_get_no_gradient() -> None:
    torch.manual_seed(0)
    head = DinoHead(4, hidden=8, bottleneck=3, prototypes=5).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    z, w = head.mlp(x).detach().numpy(), head.direction.detach().numpy()
    expected = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-9)
    head(x, frozen_prototypes=True).square().sum().backward()
    assert not head.direction.grad.any()
    assert not head.gain.grad.any()
    assert head.mlp[0].weight.grad.any()


def test_schedules() -> None:
    assert [linear(0.04, 0.08, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    assert [cosine(0.0, 1.0, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert linear(1.0, 2.0, 0, 0) == cosine(1.0, 2.0, 0, 0) == 2.0


def _process(rank: int, folder: str, scores: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cut = 7  # shares of unequal size, and the second time none at all on one process
    own = (scores[:cut], scores[cut:])[rank]
    centre = Centre(scores.shape[1], 0.9).double()
    centre.targets(own, 0.1)
    centre.update()
    lone = sinkhorn(scores if rank == 0 else scores[:0], 0.05)
    found = {"sinkhorn": sinkhorn(own, 0.05), "centre": centre.mean, "lone": lone, "koleo": koleo_loss(own)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_sinkhorn_and_centre_but_not_koleos_neighbours(tmp_path: Path) -> None:
    scores = torch.tensor(RANDOM.uniform(-1, 1, size=(10, 6)))
    mp.start_processes(_process, args=(str(tmp_path), scores), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    joined = sinkhorn(scores, 0.05)
    torch.testing.assert_close(torch.cat([first["sinkhorn"], second["sinkhorn"]]), joined)
    torch.testing.assert_close(first["lone"], joined)
    for found in (first, second):
        torch.testing.assert_close(found["centre"], 0.1 * scores.mean(dim=0))
    assert float(first["koleo"]) == pytest.approx(float(koleo_loss(scores[:7])))
    assert float(second["koleo"]) == pytest.approx(float(koleo_loss(scores[7:])))


def sinkhorn_and_koleo(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The loss of two global views, (2, B, K) of teacher and student, with KoLeo on the student's."""
    views, images, prototypes = teacher.shape
    targets = sinkhorn(teacher.reshape(-1, prototypes), 0.05).view(views, images, prototypes)
    koleo = torch.stack([koleo_loss(view) for view in student]).sum()
    return dino_loss(targets, student, student[:0], 0.1) + 0.1 * koleo


def _loss_process(rank: int, folder: str, teacher: torch.Tensor, student: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = student.chunk(2, dim=1)[rank].clone().requires_grad_()
    loss = sinkhorn_and_koleo(teacher.chunk(2, dim=1)[rank], own)
    loss.backward()
    torch.save([loss.detach(), own.grad], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Sinkhorn's targets are those of all samples; KoLeo is the mean over processes of its value on their own."""
    teacher = torch.tensor(RANDOM.uniform(-1, 1, size=(2, 8, 6)))
    student = torch.tensor(RANDOM.uniform(-1, 1, size=(2, 8, 6)), requires_grad=True)
    mp.start_processes(_loss_process, args=(str(tmp_path), teacher, student.detach()), nprocs=2, start_method="fork")
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    targets = sinkhorn(teacher.flatten(0, 1), 0.05).unflatten(0, (2, 8))
    apart = [koleo_loss(view) for half in student.chunk(2, dim=1) for view in half]
    expected = dino_loss(targets, student, student[:0], 0.1) + 0.1 * torch.stack(apart).sum() / 2
    torch.testing.assert_close((one + other) / 2, expected.detach())
    (gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(torch.cat([first, second], dim=1) / 2, gradient)
    joined = torch.stack([koleo_loss(view) for view in student]).sum()
    assert abs(float(joined.detach()) - float(torch.stack(apart).sum().detach()) / 2) > 0.01  # the rule matters here
