"""Named shapes of vision transformers: the Web-SSL family (arXiv 2504.01017, Table 1) and small ones of ours."""

from __future__ import annotations

from typing import Any

from unclipped.core.errors import UsageError, nearest

# width, blocks, heads
_SIZES = {
    "0.3b": (1024, 24, 16),
    "0.7b": (1280, 32, 16),
    "1b": (1536, 40, 24),
    "2b": (2688, 24, 21),
    "3b": (3072, 26, 24),
    "5b": (3584, 32, 28),
    "7b": (4096, 32, 32),
}
_DINO = ("0.3b", "1b", "2b", "3b", "5b", "7b")
_MAE = ("0.3b", "0.7b", "1b", "2b", "3b")


def _blocks(size: str) -> dict[str, Any]:
    width, depth, heads = _SIZES[size]
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "image_size": 224}


def _dino(size: str) -> dict[str, Any]:
    """Patch 14, class token, no registers, SwiGLU in every size (of width ⌊4·width·2/3⌋ rounded up to a multiple of 8,
    which is what transformers makes of `mlp_ratio` 4), LayerScale from 1e-5."""
    fixed = {"patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": True, "layerscale_value": 1e-5, "qkv_bias": True}
    return {"model_type": "dinov2", **_blocks(size), **fixed}


def _mae(size: str) -> dict[str, Any]:
    """Plain GELU blocks; patch 16 in the smallest size, else 14."""
    width = _SIZES[size][0]
    return {
        "model_type": "vit",
        **_blocks(size),
        "patch_size": 16 if size == "0.3b" else 14,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-6,
    }


def _ours(width: int, depth: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": side,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }


SHAPES: dict[str, dict[str, Any]] = {
    **{f"webdino-{size}": _dino(size) for size in _DINO},
    **{f"webmae-{size}": _mae(size) for size in _MAE},
    "tiny": _ours(192, 12, 3, 224, 16),
    "small": _ours(384, 12, 6, 224, 16),
}


def named_shape(name: str) -> dict[str, Any]:
    """Fields of the transformers configuration of a shape, `model_type` among them; a copy, free to change.

    Raises UsageError for an unknown name, with the nearest one.
    """
    if name not in SHAPES:
        raise UsageError(f"shape.name: no shape '{name}'; {nearest(str(name), SHAPES)}")
    return dict(SHAPES[name])


def heads_of_width(width: int) -> int | None:
    """Attention heads of the published vision transformers of this width; None when there is none."""
    known = {768: 12} | {shape["hidden_size"]: shape["num_attention_heads"] for shape in SHAPES.values()}
    return known.get(width)
