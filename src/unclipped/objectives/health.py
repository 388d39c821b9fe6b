"""Signs of collapse while an encoder is pretrained, and a picture of what its patches tell apart.

An encoder collapses when it gives all images the same features (constant), or features along few directions (low
rank); the loss may look fine meanwhile. Measuring on a micro-batch changes nothing that training depends on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from unclipped.core.errors import UnclippedError

MOST_ROWS = 2048
"""Rows of a feature matrix that its rank is taken of: the time grows with rows · width²."""
EVEN_TEACHER = 0.97
"""Entropy of a teacher's targets, as a share of the largest, from which on they say next to nothing."""
_ROUNDING = 1e-12


@contextmanager
def evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, `module` is in evaluation mode; then modes and random state are as before."""
    modes = [(part, part.training) for part in module.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for part, was_training in modes:
                part.training = was_training


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """As `evaluating`, and without gradients."""
    with evaluating(module, device), torch.no_grad():
        yield


def effective_rank(features: Tensor, *, centred: bool = True) -> float:
    """exp of the entropy of the normalised singular values of (N, D): from 1 (one direction) to min(N, D).

    Roy and Vetterli 2007; without centring it is RankMe (arXiv 2210.02885). 0 when all values are the same. At most
    `MOST_ROWS` rows enter. Raises UnclippedError for values that are not finite.
    """
    matrix = _double(features)[:MOST_ROWS]
    if centred:
        matrix = matrix - matrix.mean(dim=0)
    values = torch.linalg.svdvals(matrix)  # (min(N, D),)
    if float(values.sum()) <= _ROUNDING * math.sqrt(matrix.numel()) * float(features.abs().max()):
        return 0.0
    return math.exp(_entropy(values / values.sum()).item())


def feature_spread(features: Tensor) -> float:
    """√D · mean standard deviation over the rows of L2-normalised features (N, D): 0 constant, about 1 all directions.

    Raises UnclippedError for values that are not finite.
    """
    unit = nn.functional.normalize(_double(features), dim=1)
    return float(unit.std(dim=0, correction=0).mean()) * math.sqrt(features.shape[1])


def feature_health(features: Tensor) -> dict[str, float]:
    """`rank` and `spread` of pooled features (N, D), and their number `images`."""
    return {
        "rank": effective_rank(features),
        "spread": feature_spread(features),
        "images": float(len(features)),
    }


def assignment_health(probabilities: Tensor) -> dict[str, float]:
    """How a teacher sorts samples into prototypes, from its probabilities (N, K).

    `teacher_entropy`: mean entropy of a row as a share of log K, 0 all on one prototype, 1 all alike. `prototypes`:
    exp of the entropy of the mean row, how many prototypes are used. Raises UnclippedError for values not finite.
    """
    rows = _double(probabilities)
    most = math.log(rows.shape[1]) or 1.0
    return {
        "teacher_entropy": float(_entropy(rows).mean()) / most,
        "prototypes": math.exp(float(_entropy(rows.mean(dim=0)))),
    }


class CollapseDetector:
    """Says once, in words, when measures of health point to a collapse, and what is the likely cause.

    A warning needs two measurements in a row: fresh weights, too, give features that are much alike.
    """

    def __init__(self, *, smallest_rank: float = 2.0, smallest_spread: float = 0.02, fewest_images: int = 4) -> None:
        """Below `smallest_rank` or `smallest_spread` features count as collapsed; fewer than `fewest_images` features
        say nothing and are passed over."""
        self.smallest_rank, self.smallest_spread, self.fewest_images = smallest_rank, smallest_spread, fewest_images
        self._suspected: set[str] = set()
        self._said: set[str] = set()

    def check(self, health: Mapping[str, float]) -> list[str]:
        """New warnings from what `feature_health` measured, with that of `assignment_health` where there is a teacher.

        Measures that are absent are not judged.
        """
        if health.get("images", math.inf) < self.fewest_images:
            return []
        found: dict[str, str] = {}
        if health.get("spread", math.inf) < self.smallest_spread:
            found["constant"] = f"features are nearly constant (spread {health['spread']:.2g}, healthy: towards 1)"
        elif health.get("rank", math.inf) < self.smallest_rank:
            found["rank"] = f"features span hardly more than one direction (effective rank {health['rank']:.2g})"
        elif health.get("teacher_entropy", 0.0) > EVEN_TEACHER:
            share = f"entropy {health['teacher_entropy']:.2f} of the most there can be"
            found["even"] = f"the teacher's targets are nearly even over its prototypes ({share}) and teach little"
        again, self._suspected = self._suspected & found.keys(), set(found)
        new = sorted(again - self._said)
        self._said |= again
        return [f"{found[name]}; likely cause: {_cause(health)}" for name in new]


def _cause(health: Mapping[str, float]) -> str:
    """The likeliest cause of a collapse, with a remedy."""
    if health.get("teacher_entropy", 0.0) > EVEN_TEACHER:
        return (
            "the teacher gives all prototypes the same probability; lower teacher_temperature or learning_rate, or "
            "centre less (centre_momentum nearer to 1)"
        )
    if health.get("prototypes", math.inf) < 1.5:
        return "one prototype takes everything; raise teacher_temperature or use centring: sinkhorn"
    if health.get("images", math.inf) < 16:
        return f"only {health['images']:.0f} images in a micro-batch; raise batch_size or lower gradient_accumulation"
    if "teacher_entropy" in health:
        return "the teacher follows too fast or views are too alike; raise teacher_momentum, or lower learning_rate"
    return "too high a learning rate, or images that are too alike; lower learning_rate or look at the pictures"


def patch_colours(features: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Three principal components of patch features as red, green and blue: (B, n, D) → (B, h, w, 3) uint8.

    Components are those of all patches of the batch together, each scaled to its own range; alike colours are alike
    features, within and across images. The sign of a component is such that its largest weight is positive, so equal
    features give equal pictures. A component without variance is mid-grey. `grid`: (h, w) in patches, row-major.
    Raises UnclippedError for values that are not finite.
    """
    batch, count, width = features.shape
    if grid[0] * grid[1] != count:
        raise UnclippedError(f"patch colours: a grid of {grid[0]}×{grid[1]} holds no {count} patches")
    rows = _double(features).reshape(batch * count, width)
    total = rows.square().sum()  # before centring: what is left of equal features is rounding
    rows = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # ascending; (D,), (D, D)
    colours = torch.full((len(rows), 3), 127.5, dtype=torch.float64)
    for channel in range(min(3, width)):
        if variances[-1 - channel] <= _ROUNDING * total:
            continue
        direction = directions[:, -1 - channel]
        values = rows @ (direction * direction[direction.abs().argmax()].sign())  # (B·n,)
        low, high = values.min(), values.max()
        colours[:, channel] = 255 * (values - low) / (high - low)
    return colours.round().to(torch.uint8).reshape(batch, *grid, 3).numpy()


def _double(values: Tensor) -> Tensor:
    """A float64 copy on the CPU. Raises UnclippedError for values that are not finite."""
    values = values.detach().cpu().double()
    if bad := int((~torch.isfinite(values)).sum()):
        raise UnclippedError(
            f"health of the encoder: {bad} of {values.numel()} values are not finite; lower the learning rate or "
            "lengthen the warm-up"
        )
    return values


def _entropy(probabilities: Tensor) -> Tensor:
    """−Σ p·log p over the last dimension, zeros left out."""
    return -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
