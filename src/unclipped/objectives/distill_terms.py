"""What a student encoder learns from a frozen teacher's features: terms that any objective can add to its loss.

All terms take the student's features already at the teacher's width (see `distill_head`), are computed in float32 at
least, and send no gradient into the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unclipped.core.errors import UsageError

SHARP = 0.001
"""beta of the smooth-L1 of `amplitude` and `relation`: absolute differences, save for a quadratic tip."""


def features(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Smooth-L1 between (…, D) features, the teacher's standardised over D: a scalar mean over all entries.

    Standardising each of the teacher's vectors (mean 0, variance 1 over D) keeps the few channels of very large
    values that trained transformers have from filling the whole loss, and makes `beta` mean the same for every
    teacher. Smooth-L1 and not a cosine, because `direction` is the cosine. Raises UsageError for unequal shapes.
    """
    student, teacher = _pair(student, teacher)
    target = nn.functional.layer_norm(teacher, teacher.shape[-1:])  # (…, D)
    return nn.functional.smooth_l1_loss(student, target, beta=beta)


def direction(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − mean cosine between (…, D) features: a scalar between 0 and 2, free of their lengths.

    Direction loss of Penguin-VL (arXiv 2603.06569). Raises UsageError for unequal shapes.
    """
    student, teacher = _pair(student, teacher)
    return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1).mean()


def amplitude(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth-L1 with beta 0.001 between (…, D) features: a scalar, almost their mean absolute difference.

    Amplitude loss of Penguin-VL (arXiv 2603.06569). Raises UsageError for unequal shapes.
    """
    student, teacher = _pair(student, teacher)
    return nn.functional.smooth_l1_loss(student, teacher, beta=SHARP)


def relation(student: Tensor, teacher: Tensor, *, chunk: int | None = None) -> Tensor:
    """Smooth-L1 with beta 0.001 between the cosines of all pairs of patches: (B, n, D), (B, n, D') → scalar.

    The cosines are compared within each image, so that a loss does not depend on which images share a batch; the
    widths may differ. chunk: rows of the (n, n) matrices compared at a time; without gradients it bounds the memory
    at (B, chunk, n). Relation loss of Penguin-VL (arXiv 2603.06569), there over all patches of a batch. Raises
    UsageError for features that are not (B, n, ·) of the same patches.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise UsageError(
            "distillation: expected features (images, patches, width) of the same patches, found "
            f"{tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher; resize the teacher's "
            "grid to the student's"
        )
    ours = nn.functional.normalize(_wide(student), dim=-1)  # (B, n, D)
    theirs = nn.functional.normalize(_wide(teacher.detach()), dim=-1)  # (B, n, D')
    images, patches = ours.shape[:2]
    total = ours.new_zeros(())
    for rows, wanted in zip(ours.split(chunk or patches, dim=1), theirs.split(chunk or patches, dim=1), strict=True):
        found, expected = rows @ ours.mT, wanted @ theirs.mT  # (B, chunk, n)
        total = total + nn.functional.smooth_l1_loss(found, expected, beta=SHARP, reduction="sum")
    return total / (images * patches * patches)


def distill_head(student_width: int, teacher_width: int) -> nn.Linear:
    """The linear map from the student's width to the teacher's; it belongs to pretraining and is dropped after it."""
    return nn.Linear(student_width, teacher_width)


def resize_grid(patches: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Patch features (B, h·w, D) of `grid` (h, w) → (B, h'·w', D) of `wanted`, bilinear, row-major.

    Shrinking averages over the patches that a new one covers. Raises UsageError when `grid` is not that of `patches`.
    """
    if patches.shape[1] != grid[0] * grid[1]:
        raise UsageError(f"distillation: a grid of {grid[0]}×{grid[1]} holds no {patches.shape[1]} patches")
    if grid == wanted:
        return patches
    planes = _wide(patches).unflatten(1, grid).permute(0, 3, 1, 2)  # (B, D, h, w)
    resized = nn.functional.interpolate(planes, size=wanted, mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).mT.to(patches.dtype)  # (B, h'·w', D)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both at float32 or more, the teacher without gradient. Raises UsageError for unequal shapes."""
    if student.shape != teacher.shape:
        raise UsageError(
            f"distillation: expected features of one shape, found {tuple(student.shape)} of the student and "
            f"{tuple(teacher.shape)} of the teacher; project the student to the teacher's width and resize the "
            "teacher's grid to the student's"
        )
    return _wide(student), _wide(teacher.detach())


def _wide(values: Tensor) -> Tensor:
    """bfloat16 and float16 as float32: near-equal features would differ by rounding alone."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
