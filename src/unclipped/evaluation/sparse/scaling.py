"""How much attention can matter: its share of a decoder's work by layer shapes, Amdahl's bound, fitted exponents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from unclipped.core.errors import UsageError


def attention_share(tokens: int, *, heads: int, head_dim: int, linear_parameters: int) -> float:
    """Attention's share of the multiply-adds of a decoder layer's prefill (reference page, section 1).

    A token costs 2·parameters in the layer's linear maps and, on average over a causal row, 2·heads·head_dim·tokens in
    attention (QKᵀ and PV, half of the pairs).
    """
    attention = 2.0 * heads * head_dim * tokens
    return attention / (attention + 2.0 * linear_parameters)


def amdahl(share: float, density: float = 0.0) -> float:
    """Largest speed-up of the whole when the share's work falls to `density` of it."""
    left = 1.0 - share * (1.0 - density)
    return 1.0 / left if left > 0.0 else math.inf


def layer_shape(decoder: Any) -> dict[str, int]:
    """heads, key_heads, head_dim, layers and linear_parameters (mean of a layer) of a transformers decoder."""
    config, layers = decoder.config, getattr(decoder, "layers", None)
    if layers is None:
        raise UsageError(f"{type(decoder).__name__}: its layers are not found under `layers`, so it cannot be timed")
    heads = int(config.num_attention_heads)
    linear = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
    return {
        "heads": heads,
        "key_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "layers": len(layers),
        "linear_parameters": linear // len(layers),
    }


def exponent(lengths: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Slope of log(seconds) over log(lengths) by least squares: 1 is linear, 2 quadratic. None below two lengths."""
    if len(set(lengths)) < 2:
        return None
    xs, ys = [math.log(length) for length in lengths], [math.log(second) for second in seconds]
    middle, height = sum(xs) / len(xs), sum(ys) / len(ys)
    top = sum((x - middle) * (y - height) for x, y in zip(xs, ys, strict=True))
    return top / sum((x - middle) ** 2 for x in xs)
