"""The losses of DINOv2 (arXiv 2304.07193): cross-entropy between teacher and student, iBOT, KoLeo; and centring.

What is computed over a whole batch is summed over processes here: Sinkhorn's totals and the running centre. KoLeo
looks for neighbours within the batch of one process only.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from unclipped.core.errors import UsageError

KOLEO_EPSILON = 1e-8
SINKHORN_BLOCK = 2**22
"""Scores that Sinkhorn works on at a time."""


def wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def cross_entropy(targets: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """−Σ targets · log softmax(scores / temperature) of each row: (…, K) twice → (…)."""
    return -(targets * F.log_softmax(wide(scores) / temperature, dim=-1)).sum(dim=-1)


def dino_loss(targets: Tensor, global_scores: Tensor, local_scores: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's global view and another view of the student.

    targets (2, B, K), global_scores (2, B, K), local_scores (L, B, K). Pairs: 2·L with local views and the 2 crossed
    global ones.
    """
    total = cross_entropy(targets.flip(0), global_scores, temperature).mean(dim=1).sum()
    total = total + cross_entropy(targets[:, None], local_scores[None], temperature).mean(dim=2).sum()
    return total / (2 + 2 * len(local_scores))


def ibot_loss(targets: Tensor, scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Cross-entropy at masked patches: mean over each image's masked patches, then over all images.

    targets, scores (M, K) of the masked patches in the order of `mask` (images, n) bool. An image without masked
    patches contributes nothing and stays in the denominator.
    """
    per_image = mask.sum(dim=1).clamp(min=1)  # (images,)
    losses = cross_entropy(targets, scores, temperature)  # (M,)
    weights = per_image.to(losses.dtype).reciprocal()[:, None].expand_as(mask)[mask]  # (M,)
    return (losses * weights).sum() / len(mask)


def koleo_loss(features: Tensor, chunk: int = 1024) -> Tensor:
    """−mean log of the distance to the nearest neighbour, on L2-normalised features (B, D).

    Neighbours are looked for in `chunk` rows at a time, so memory grows with chunk · B. Raises UsageError for fewer
    than two rows.
    """
    if len(features) < 2:
        raise UsageError(
            f"koleo: needs at least two images in a micro-batch of one process, found {len(features)}; raise "
            "batch_size, lower gradient_accumulation, or set dinov2.koleo_weight to 0"
        )
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(wide(features), dim=-1)
        with torch.no_grad():
            nearest = []
            for start in range(0, len(unit), chunk):
                similarity = unit[start : start + chunk] @ unit.T  # (chunk, B)
                rows = torch.arange(len(similarity), device=unit.device)
                similarity[rows, rows + start] = -math.inf
                nearest.append(similarity.argmax(dim=1))
        distance = torch.linalg.vector_norm(unit - unit[torch.cat(nearest)], dim=-1)  # (B,)
        return -(distance + KOLEO_EPSILON).log().mean()


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _summed(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if _is_joined():
        dist.all_reduce(values, op=op)
    return values


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3, *, over_processes: bool = True) -> Tensor:
    """Assignments of samples to prototypes, all prototypes used alike: (B, K) → (B, K), rows sum to one.

    Sinkhorn–Knopp on exp(scores / temperature) in logarithms: in turn each prototype's total over the samples of all
    processes (of this one without `over_processes`) becomes 1/K and each sample's 1/B. A process may have no sample.
    """
    log_q = wide(scores) / temperature  # changed in place from here on; what comes beside it covers a block of rows
    blocks = log_q.split(max(1, SINKHORN_BLOCK // log_q.shape[1]))
    for _ in range(iterations):
        peak = log_q.amax(dim=0) if len(log_q) else log_q.new_full((log_q.shape[1],), -math.inf)  # (K,)
        if over_processes:
            peak = _summed(peak, dist.ReduceOp.MAX)
        total = torch.zeros_like(peak)
        for block in blocks:
            total += (block - peak).exp_().sum(dim=0)  # (K,)
        if over_processes:
            total = _summed(total)
        peak += total.log_()
        for block in blocks:
            block -= peak
            block -= block.logsumexp(dim=1, keepdim=True)
    return log_q.exp_()


class Centre(nn.Module):
    """A running mean of the teacher's scores that is taken off before its softmax (DINO, arXiv 2104.14294).

    Batches are noted as they come in training mode and enter the mean in `update`, over all processes.
    """

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(prototypes))
        self._noted: Tensor | None = None

    @torch.no_grad()
    def targets(self, scores: Tensor, temperature: float) -> Tensor:
        """softmax((scores − mean) / temperature) of (B, K); in training the scores are noted for the next update."""
        scores = wide(scores)
        if self.training:
            noted = torch.cat([scores.sum(dim=0), scores.new_tensor([float(len(scores))])])  # (K + 1,)
            self._noted = noted if self._noted is None else self._noted + noted
        return F.softmax((scores - self.mean) / temperature, dim=-1)

    @torch.no_grad()
    def update(self) -> None:
        """Move the mean towards that of the scores noted since the last update."""
        if self._noted is None:
            return
        noted = _summed(self._noted)
        if noted[-1] > 0:
            self.mean.lerp_((noted[:-1] / noted[-1]).to(self.mean.dtype), 1 - self.momentum)
        self._noted = None
