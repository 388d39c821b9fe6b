"""Distillation: a student encoder learns the features of a frozen teacher encoder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.base import VisionEncoder
from unclipped.images.config import ImageRule
from unclipped.objectives import distill_terms as terms
from unclipped.objectives.base import OBJECTIVES, Batch, Counts, Objective
from unclipped.objectives.distill_config import DistillConfig
from unclipped.objectives.health import feature_health
from unclipped.objectives.trunk import Trunk, TrunkOutput

FINGERPRINT = "teacher_fingerprint"


@OBJECTIVES.register("distill")
class DistillObjective(Objective):
    """Weighted sum of the terms of `distill_terms.py`, each the mean over a micro-batch.

    `features` has a linear head of its own, since its target is standardised; direction, amplitude and relation share
    one, as in Penguin-VL (arXiv 2603.06569). The teacher is no submodule: it stays in evaluation mode and out of
    checkpoints, which hold a fingerprint of its weights instead.
    """

    needs = "images"

    def __init__(self, trunk: Trunk, teacher: VisionEncoder, config: DistillConfig, rule: ImageRule) -> None:
        """`rule`: side, mean and standard deviation of the student's images. Raises UsageError for grids or channels
        that differ."""
        super().__init__()
        self.model, self.options, self.main_size = trunk, config, rule.size
        guide = Trunk(teacher).eval().requires_grad_(False)
        self._teacher = (guide,)  # in a tuple, it is not registered
        if guide.channels != trunk.channels:
            raise UsageError(
                f"distill.teacher: takes images of {guide.channels} channels, the student of {trunk.channels}; set "
                f"shape.num_channels to {guide.channels}"
            )
        self.fit(rule)
        self.heads = nn.ModuleDict()
        if config.features:
            self.heads["features"] = terms.distill_head(trunk.width, guide.width)
        if config.direction or config.amplitude or config.relation:
            self.heads["patches"] = terms.distill_head(trunk.width, guide.width)
        if config.pooled:
            self.heads["pooled"] = terms.distill_head(trunk.width, guide.width)
        self.statistics = [torch.tensor(v).view(-1, 1, 1) for v in (rule.mean, rule.std)]
        self.teacher_statistics = [torch.tensor(v).view(-1, 1, 1) for v in (teacher.spec.mean, teacher.spec.std)]
        self.register_buffer(FINGERPRINT, fingerprint(guide))

    def fit(self, rule: ImageRule) -> None:
        """Learn from images of the size of `rule` from here on; the teacher's images grow with the student's.

        A teacher with a position table sees its own size at the student's first one, else as many patches as the
        student. Raises UsageError for grids that differ, and for a size that the teacher's patches do not fill.
        """
        assert rule.size is not None
        assert self.main_size is not None
        guide, trunk = self._teacher[0], self.model
        self.grid = grid = (rule.size[0] // trunk.patch_size[0], rule.size[1] // trunk.patch_size[1])
        own = guide.encoder.spec.image_size
        sizes = []
        for axis, patch in enumerate(guide.patch_size):
            side = grid[axis] * patch if own is None else own[axis] * rule.size[axis] / self.main_size[axis]
            if side % patch:
                raise UsageError(
                    f"distill.teacher: beside images of {rule.size[axis]} px its own would be of {side:g} px, no "
                    f"multiple of its patch of {patch} px; choose another image_size"
                )
            sizes.append(int(side))
        self.teacher_size = tuple(sizes)
        self.teacher_grid = tuple(side // patch for side, patch in zip(sizes, guide.patch_size, strict=True))
        if self.teacher_grid != grid and not self.options.resize_grid:
            raise UsageError(
                f"distill.teacher: its grid is {self.teacher_grid[0]}×{self.teacher_grid[1]} patches, the student's "
                f"{grid[0]}×{grid[1]}; change image_size or shape.patch_size, or set distill.resize_grid"
            )

    def part_of(self, name: str) -> Literal["vision", "connector", "text"]:
        return "vision"

    def num_tokens(self, batch: Batch) -> int:
        """Patches that the student sees."""
        return batch["pixel_values"].shape[0] * self.grid[0] * self.grid[1]

    def num_samples(self, batch: Batch) -> int:
        return batch["pixel_values"].shape[0]

    def forward(self, *, counts: Counts | None = None, pixel_values: Tensor, **unused: Any) -> dict[str, Any]:
        """pixel_values: (B, C, S, S), normalised for the student."""
        target, seen = self.target(pixel_values), self.model(pixel_values)
        config, found = self.options, {}
        if config.features:
            found["features"] = terms.features(self.heads["features"](seen.patches), target.patches)
        if "patches" in self.heads:
            student = self.heads["patches"](seen.patches)  # (B, n, D teacher)
            if config.direction:
                found["direction"] = terms.direction(student, target.patches)
            if config.amplitude:
                found["amplitude"] = terms.amplitude(student, target.patches)
            if config.relation:
                found["relation"] = terms.relation(student, target.patches, chunk=config.relation_chunk)
        if config.pooled:
            found["pooled"] = terms.direction(self.heads["pooled"](seen.pooled), target.pooled)
        loss = torch.stack([getattr(config, name) * value for name, value in found.items()]).sum()
        return {"loss": loss, "parts": {name: value.detach() for name, value in found.items()}}

    @torch.no_grad()
    def target(self, pixel_values: Tensor) -> TrunkOutput:
        """The teacher's features of the same images, at its own size and normalisation, on the student's grid."""
        guide = self._teacher[0].to(pixel_values.device)
        (mean, std), (own_mean, own_std) = (
            [value.to(pixel_values) for value in values] for values in (self.statistics, self.teacher_statistics)
        )
        pixels = pixel_values * std + mean  # (B, C, S, S) in 0…1
        if pixels.shape[-2:] != self.teacher_size:
            pixels = nn.functional.interpolate(
                pixels, size=self.teacher_size, mode="bilinear", align_corners=False, antialias=True
            )
        seen = guide((pixels - own_mean) / own_std)
        height, width = self.teacher_grid
        return replace(seen, patches=terms.resize_grid(seen.patches, (height, width), self.grid))

    def health(self, batch: Batch) -> dict[str, float]:
        """Rank and spread of the student's pooled features."""
        return feature_health(self.model(batch["pixel_values"]).pooled)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **named: Any) -> None:
        stored = state_dict.get(prefix + FINGERPRINT)
        own: Any = getattr(self, FINGERPRINT)
        if stored is not None and not torch.equal(stored.cpu(), own.cpu()):
            raise CheckpointError(
                "distill.teacher: the checkpoint was trained with a teacher of other weights; give the same teacher, "
                "or start a new run"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **named)


def fingerprint(module: nn.Module) -> Tensor:
    """Four int64 of the SHA-256 of all names and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    parts = [digest.digest()[start : start + 8] for start in range(0, 32, 8)]
    return torch.tensor([int.from_bytes(part, "little", signed=True) for part in parts])
