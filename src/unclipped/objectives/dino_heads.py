"""The head of DINO and iBOT: an MLP to a normalised bottleneck, then prototypes of normalised direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STD = 0.02
_SHORTEST = 1e-12
"""Norm below which a direction counts as this long."""


class DinoHead(nn.Module):
    """Scores of features against prototypes: (…, width) → (…, prototypes).

    Three linear layers with GELU between them, L2 normalisation, and a linear map whose rows are a unit vector times a
    gain that starts at one (weight normalisation).
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.direction = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.gain = nn.Parameter(torch.ones(prototypes))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.direction, std=_STD)

    def forward(self, features: Tensor, *, frozen_prototypes: bool = False) -> Tensor:
        """With `frozen_prototypes` they get zero gradients: weight decay then shortens directions, which changes
        nothing, and distributed wrappers still see every parameter used."""
        direction, gain = self.direction, self.gain
        if frozen_prototypes:
            direction, gain = direction.detach() + 0.0 * direction, gain.detach() + 0.0 * gain
        # Scores are scaled, not the rows, of which there are more than samples.
        scale = gain / torch.linalg.vector_norm(direction, dim=-1).clamp(min=_SHORTEST)  # (K,)
        return F.linear(F.normalize(self.mlp(features), dim=-1), direction) * scale
