"""Projections from the encoder's width to the language model's: linear and mlp."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from unclipped.core.registry import Registry

CONNECTORS: Registry[Callable[[int, int, int], nn.Sequential]] = Registry("connector")


@CONNECTORS.register("linear")
def linear(in_features: int, out_features: int, layers: int = 1) -> nn.Sequential:
    """One layer with bias: (…, in) -> (…, out)."""
    return nn.Sequential(nn.Linear(in_features, out_features))


@CONNECTORS.register("mlp")
def mlp(in_features: int, out_features: int, layers: int = 2) -> nn.Sequential:
    """`layers` layers with bias and exact GELU between them: (…, in) -> (…, out), inner width `out_features`."""
    modules: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(layers - 1):
        modules += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*modules)
