"""DINOv2 (arXiv 2304.07193): a student matches its own moving average on crops and on masked patches."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unclipped.core.errors import UsageError
from unclipped.objectives.base import OBJECTIVES, Batch, Counts, Objective
from unclipped.objectives.dino_heads import DinoHead
from unclipped.objectives.dino_losses import Centre, dino_loss, ibot_loss, koleo_loss, sinkhorn, wide
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.objectives.health import assignment_health, feature_health
from unclipped.objectives.schedules import cosine, linear
from unclipped.objectives.trunk import Trunk


class _Side(nn.Module):
    """A trunk with its two heads: the student, or the teacher."""

    def __init__(self, trunk: Trunk, config: DinoV2Config) -> None:
        super().__init__()
        self.trunk = trunk
        sizes = {"hidden": config.head_hidden, "prototypes": config.prototypes}
        self.dino_head = DinoHead(trunk.width, bottleneck=config.bottleneck, **sizes)
        ibot_bottleneck = config.ibot_bottleneck or config.bottleneck
        self.ibot_head = DinoHead(trunk.width, bottleneck=ibot_bottleneck, **sizes) if config.ibot_weight else None


@OBJECTIVES.register("dinov2")
class DinoV2Objective(Objective):
    """L_DINO + L_iBOT + KoLeo, each with its weight, with separate heads for views and patches.

    The teacher, the centres and the number of finished steps lie in the state dict, so a resumed run goes on with them.
    The loss is the mean over a micro-batch; Sinkhorn balances, and KoLeo looks for neighbours, within a micro-batch
    (Sinkhorn over all processes).
    """

    needs = "images"
    student: _Side
    teacher: _Side

    def __init__(self, trunk: Trunk, config: DinoV2Config, *, steps: int) -> None:
        """`steps`: where the teacher's momentum ends its course. Raises UsageError for an unmaskable trunk."""
        super().__init__()
        if config.ibot_weight and trunk.mask_token is None:
            raise UsageError("dinov2: the trunk has no mask token; build it with maskable, or set ibot_weight to 0")
        self.options, self.steps, self.main_steps = config, steps, steps
        self.share = 1.0
        """Length of the present stage's schedules as a share of the main stage's."""
        self.student = _Side(trunk, config)
        if not config.ibot_weight and trunk.mask_token is not None:
            trunk.mask_token.requires_grad_(False)
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False).eval()
        self.model = trunk
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.centres = nn.ModuleDict()
        if config.centring == "ema":
            for name in ("dino", "ibot"):
                self.centres[name] = Centre(config.prototypes, config.centre_momentum)

    def train(self, mode: bool = True) -> DinoV2Objective:
        """The teacher stays in evaluation mode: no dropped paths."""
        super().train(mode)
        self.teacher.eval()
        return self

    def part_of(self, name: str) -> Literal["vision", "connector", "text"]:
        return "vision"

    def module_of(self, name: str) -> str:
        """`trunk`, `dino_head` or `ibot_head`."""
        return name.split(".")[1]

    def schedules(self) -> dict[str, float]:
        """The teacher's temperature and momentum."""
        return {"teacher_temperature": self._temperature(), "teacher_momentum": self._momentum()}

    def num_samples(self, batch: Batch) -> int:
        return batch["global_crops"].shape[0] // 2

    def num_tokens(self, batch: Batch) -> int:
        """Patches that the student sees."""
        height, width = self.model.patch_size
        return sum(
            crops.shape[0] * (crops.shape[2] // height) * (crops.shape[3] // width)
            for crops in (batch["global_crops"], batch["local_crops"])
        )

    def forward(
        self, *, counts: Counts | None = None, global_crops: Tensor, local_crops: Tensor, mask: Tensor, **unused: Any
    ) -> dict[str, Any]:
        """global_crops (2·B, C, H, W): the first crops of all images, then the second; local_crops (L·B, C, h, w)
        likewise; mask (2·B, n) bool: patches of the global crops that the student does not see."""
        config, student, images = self.options, self.student, len(global_crops) // 2
        is_frozen = int(self.step) < self._in_stage(config.frozen_prototype_steps)
        dino_targets, ibot_targets = self._targets(global_crops, mask)
        seen = student.trunk(global_crops, mask if config.ibot_weight else None)
        pooled = [seen.pooled, student.trunk(local_crops).pooled] if len(local_crops) else [seen.pooled]
        # One call for all views: the prototypes are normalised, and get their gradient, once.
        views = student.dino_head(torch.cat(pooled), frozen_prototypes=is_frozen).unflatten(0, (-1, images))
        scores, local = views[:2], views[2:]  # (2, B, K), (L, B, K)
        loss = dino = dino_loss(dino_targets.unflatten(0, (2, images)), scores, local, config.student_temperature)
        parts = {"dino": dino.detach()}
        if ibot_targets is not None:
            assert student.ibot_head is not None
            patches = student.ibot_head(seen.patches[mask], frozen_prototypes=is_frozen)  # (M, K)
            ibot = ibot_loss(ibot_targets, patches, mask, config.student_temperature)
            loss = loss + config.ibot_weight * ibot
            parts["ibot"] = ibot.detach()
        if config.koleo_weight:
            koleo = torch.stack([koleo_loss(view) for view in seen.pooled.chunk(2)]).sum()
            loss = loss + config.koleo_weight * koleo
            parts["koleo"] = koleo.detach()
        return {"loss": loss, "parts": parts}

    @torch.no_grad()
    def _targets(self, global_crops: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's distributions: (2·B, K) for views, (M, K) for masked patches."""
        seen = self.teacher.trunk(global_crops)
        views = self._balanced("dino", self.teacher.dino_head(seen.pooled))
        if self.teacher.ibot_head is None:
            return views, None
        return views, self._balanced("ibot", self.teacher.ibot_head(seen.patches[mask]))

    def _balanced(self, name: str, scores: Tensor) -> Tensor:
        if self.options.centring == "sinkhorn":
            return sinkhorn(scores, self._temperature(), self.options.sinkhorn_iterations)
        centre: Any = self.centres[name]
        return centre.targets(scores, self._temperature())

    def _temperature(self) -> float:
        """The teacher's, at this step."""
        steps = self._in_stage(self.options.teacher_temperature_steps)
        return linear(*self.options.teacher_temperature, int(self.step), steps)

    def _in_stage(self, steps: int) -> int:
        """Steps that are meant for the main stage, in proportion to the present one."""
        return round(steps * self.share)

    def start_stage(self, steps: int) -> None:
        """Begin a stage whose schedules end at `steps`: weights, teacher and centres go on, schedules begin anew.

        They are those of the main stage, compressed, as in DINOv2's high-resolution phase (arXiv 2304.07193, B.2).
        """
        self.steps, self.share = steps, steps / self.main_steps
        self.step.zero_()

    def _momentum(self) -> float:
        """The teacher's, after this step."""
        return cosine(*self.options.teacher_momentum, int(self.step), self.steps)

    def health(self, batch: Batch) -> dict[str, float]:
        """Rank and spread of the teacher's features of first global crops; entropy and use of its prototypes.

        Prototypes are balanced within this process, so no process waits for another.
        """
        pooled = self.teacher.trunk(batch["global_crops"].chunk(2)[0]).pooled  # (B, D)
        scores = wide(self.teacher.dino_head(pooled))  # (B, K)
        if self.options.centring == "sinkhorn":
            iterations = self.options.sinkhorn_iterations
            shares = sinkhorn(scores, self._temperature(), iterations, over_processes=False)
        else:
            mean: Any = self.centres["dino"].mean
            shares = ((scores - mean) / self._temperature()).softmax(dim=-1)
        return feature_health(pooled) | assignment_health(shares)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the teacher towards the student, and the centres towards the step's scores."""
        momentum = self._momentum()
        for theirs, own in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            theirs.lerp_(own.detach(), 1 - momentum)
        for centre in self.centres.values():
            centre.update()  # type: ignore[operator] - a ModuleDict does not say what it holds
        self.step += 1
