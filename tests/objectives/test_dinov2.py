"""The DINOv2 objective: its sum of losses, the teacher, frozen prototypes, and encoders of several families."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from unclipped.core.errors import UsageError
from unclipped.objectives.dino_losses import dino_loss, ibot_loss, koleo_loss, sinkhorn
from unclipped.objectives.dinov2 import DinoV2Objective
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.objectives.trunk import build_trunk
from unclipped.training.measure import count_flops, estimate_flops

VIT: dict[str, Any] = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLM: dict[str, Any] = {
    "model_type": "unclipped_llm_encoder",
    "patch_size": 8,
    "text_config": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip
SHAPES = {"vit": VIT, "dinov2": VIT | {"model_type": "dinov2", "drop_path_rate": 0.5}, "llm": LLM}
HEADS: dict[str, Any] = {"prototypes": 12, "head_hidden": 16, "bottleneck": 8, "local_crops": 2, "local_size": 16}


def objective(shape: str = "vit", *, maskable: bool = True, **fields: Any) -> DinoV2Objective:
    torch.manual_seed(0)
    trunk = build_trunk(SHAPES[shape], image_size=None if shape == "llm" else 32, maskable=maskable)
    return DinoV2Objective(trunk, DinoV2Config(**(HEADS | fields)), steps=10)


def batch(images: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(2 * images, 16, dtype=torch.bool)
    mask[0, :5] = mask[-1, 3:6] = True
    return {
        "global_crops": torch.randn(2 * images, 3, 32, 32, generator=generator),
        "local_crops": torch.randn(2 * images, 3, 16, 16, generator=generator),
        "mask": mask,
    }


def test_the_loss_is_the_sum_of_its_parts_put_together_by_hand() -> None:
    own, given = objective().eval(), batch()
    found = own(**given)
    seen = own.student.trunk(given["global_crops"], given["mask"])
    taught = own.teacher.trunk(given["global_crops"])
    assert own.student.ibot_head is not None
    assert own.teacher.ibot_head is not None
    dino = dino_loss(
        sinkhorn(own.teacher.dino_head(taught.pooled), 0.07).view(2, 3, -1),
        own.student.dino_head(seen.pooled).view(2, 3, -1),
        own.student.dino_head(own.student.trunk(given["local_crops"]).pooled).view(2, 3, -1),
        0.1,
    )
    mask = given["mask"]
    ibot = ibot_loss(
        sinkhorn(own.teacher.ibot_head(taught.patches[mask]), 0.07),
        own.student.ibot_head(seen.patches[mask]),
        mask,
        0.1,
    )
    koleo = koleo_loss(seen.pooled[:3]) + koleo_loss(seen.pooled[3:])
    torch.testing.assert_close(found["loss"], dino + ibot + 0.1 * koleo)
    assert set(found["parts"]) == {"dino", "ibot", "koleo"}


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("centring", ["sinkhorn", "ema"])
def test_every_student_parameter_learns_and_the_loss_falls_while_the_teacher_stands(shape: str, centring: str) -> None:
    own, given = objective(shape, centring=centring, koleo_weight=0).train(), batch()
    trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher.") for name in trained)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=3e-3), []
    for step in range(12):
        loss = own(**given)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert not [name for name, p in trained.items() if p.grad is None]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(module.training for module in own.teacher.modules())


def test_after_step_moves_the_teacher_by_the_cosine_of_momenta() -> None:
    own = objective(teacher_momentum=(0.5, 1.0))
    with torch.no_grad():
        for parameter in own.student.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in own.teacher.parameters()]
    own.after_step()
    for theirs, old, mine in zip(own.teacher.parameters(), before, own.student.parameters(), strict=True):
        torch.testing.assert_close(theirs, 0.5 * old + 0.5 * mine)
    own.step.fill_(10)
    before = [p.clone() for p in own.teacher.parameters()]
    own.after_step()
    assert all(torch.equal(a, b) for a, b in zip(own.teacher.parameters(), before, strict=True))


def test_heads_may_have_bottlenecks_of_their_own() -> None:
    student = objective(ibot_bottleneck=6).student
    assert student.ibot_head is not None
    assert (student.dino_head.direction.shape[1], student.ibot_head.direction.shape[1]) == (8, 6)


def test_paths_are_dropped_uniformly_in_the_student_alone() -> None:
    """Every block drops an image's path with the configured probability, in training only."""
    own = objective("dinov2")
    paths = [module for module in own.modules() if type(module).__name__ == "Dinov2DropPath"]
    assert len(paths) == 2 * VIT["num_hidden_layers"]  # one in each block of student and teacher
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    dropped = [(path.training, float((path(x) == 0).all(dim=(1, 2)).double().mean())) for path in paths]
    of_student = [share for is_training, share in dropped if is_training]
    of_teacher = [share for is_training, share in dropped if not is_training]
    assert of_student
    assert all(0.46 < share < 0.54 for share in of_student)  # 0.5, five standard deviations
    assert of_teacher == [0.0] * len(of_student)


def test_counting_operations_leaves_nothing_for_the_first_step() -> None:
    own, device = objective(centring="ema"), torch.device("cpu")
    assert count_flops(own, batch(), device, None) > 0
    assert own.student.training
    assert not own.teacher.training
    assert all(centre._noted is None for centre in own.centres.values())
    trained = sum(p.numel() for p in own.student.parameters())
    patches = 3 * (2 * 16 + 2 * 4)  # images · patches of their crops
    assert estimate_flops(own, batch()) == (6 + 2) * trained * patches  # the teacher has no backward pass


def test_prototypes_stay_for_the_first_steps() -> None:
    own, given = objective(frozen_prototype_steps=1), batch()
    head = own.student.dino_head
    for is_frozen in (True, False):
        own.zero_grad()
        own(**given)["loss"].backward()
        assert head.direction.grad is not None
        assert bool(head.direction.grad.any()) is not is_frozen
        own.after_step()


def test_the_state_dict_holds_teacher_centres_and_step() -> None:
    own, given = objective(centring="ema"), batch()
    own(**given)
    own.after_step()
    own.eval()
    assert bool(own.centres["ibot"].mean.any())
    other = objective(centring="ema").eval()
    other.load_state_dict(own.state_dict())
    assert int(other.step) == 1
    assert any(name.startswith("centres.ibot") for name in own.state_dict())
    torch.testing.assert_close(other(**given)["loss"], own(**given)["loss"], rtol=0, atol=0)


def test_parts_can_be_switched_off() -> None:
    found = objective(ibot_weight=0, koleo_weight=0, maskable=False)(
        **batch() | {"local_crops": torch.zeros(0, 3, 16, 16)}
    )
    assert set(found["parts"]) == {"dino"}


@pytest.mark.parametrize("centring", ["sinkhorn", "ema"])
def test_health_is_that_of_the_teacher_and_changes_nothing(centring: str) -> None:
    own, given = objective(centring=centring), batch(images=4)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    with torch.no_grad():
        health = own.health(given)
        scores = own.teacher.dino_head(own.teacher.trunk(given["global_crops"][:4]).pooled)
    shares = sinkhorn(scores, 0.07) if centring == "sinkhorn" else (scores / 0.07).softmax(dim=1)
    entropy = -(shares * shares.log()).sum(dim=1).mean() / math.log(12)
    mean = shares.mean(dim=0)
    assert health["images"] == 4
    assert 1 <= health["rank"] <= 4
    assert health["teacher_entropy"] == pytest.approx(float(entropy), abs=1e-5)
    assert health["prototypes"] == pytest.approx(math.exp(-(mean * mean.log()).sum()), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert all(centre._noted is None for centre in own.centres.values())


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="no mask token; build it with maskable, or set ibot_weight to 0"):
        objective(maskable=False)
    with pytest.raises(UsageError, match=r"at least two images in a micro-batch of one process, found 1"):
        objective()(**batch(1))
