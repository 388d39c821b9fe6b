"""Factors on the learning rates of a vision encoder's layers: the patch embedding, and a decay over depth."""

from __future__ import annotations

from torch import nn

from unclipped.core.errors import UsageError
from unclipped.encoders.base import VisionEncoder
from unclipped.objectives.trunk import Trunk
from unclipped.training.config import OptimizerConfig
from unclipped.training.device import repeated_blocks

PATCH_EMBEDDING = {"patch_embeddings", "patch_embedding", "stem"}
"""Names of the module that turns patches into features, over the families of encoders."""
BEFORE_BLOCKS = {"embeddings", "stem"}
"""Names of the modules whose parameters come before the first block."""


def rate_factors(model: nn.Module, config: OptimizerConfig) -> dict[int, float]:
    """Factor on the learning rate of each parameter of the encoders in `model`, by `id(parameter)`; others have 1.

    Of n blocks, block i = 0 … n − 1 has `layer_decay` to the power n − i, what comes before the blocks n + 1, the final
    norm and everything outside the encoder 0 (as DINOv2 counts, arXiv 2304.07193); parameters of the patch embedding
    have `patch_embedding_factor` beside it. Raises UsageError when a factor is asked for and there is no encoder, or
    one whose parts are not found.
    """
    if config.layer_decay == 1.0 and config.patch_embedding_factor == 1.0:
        return {}
    encoders = [module for module in model.modules() if isinstance(module, VisionEncoder)]
    if not encoders:
        raise UsageError(
            "optimizer: layer_decay and patch_embedding_factor are about a vision encoder, and this model has none; "
            "leave them out"
        )
    factors: dict[int, float] = {}
    for encoder in encoders:
        factors |= _encoder_factors(encoder, config)
    for trunk in model.modules():
        if isinstance(trunk, Trunk) and trunk.mask_token is not None:  # stands in for embedded patches
            factors[id(trunk.mask_token)] = config.layer_decay ** (_depth(trunk.encoder) + 1)
    return factors


def _encoder_factors(encoder: VisionEncoder, config: OptimizerConfig) -> dict[int, float]:
    depth = _depth(encoder)
    exponents = {
        id(parameter): depth - index
        for index, block in enumerate(repeated_blocks(encoder.model))
        for parameter in block.parameters()
    }
    factors: dict[int, float] = {}
    has_patch_embedding = False
    for name, parameter in encoder.model.named_parameters():
        pieces = set(name.split("."))
        outside = depth + 1 if pieces & BEFORE_BLOCKS else 0
        factor = config.layer_decay ** exponents.get(id(parameter), outside)
        if pieces & PATCH_EMBEDDING and id(parameter) not in exponents:
            factor, has_patch_embedding = factor * config.patch_embedding_factor, True
        factors[id(parameter)] = factor
    if not has_patch_embedding:
        raise UsageError(
            f"optimizer.patch_embedding_factor: the encoder '{encoder.family}' shows no patch embedding; leave it out"
        )
    return factors


def _depth(encoder: VisionEncoder) -> int:
    """Number of the encoder's blocks. Raises UsageError when they are not all in one list."""
    found, stated = len(repeated_blocks(encoder.model)), encoder.depth(encoder.model.config)
    if found != stated:
        raise UsageError(
            f"optimizer.layer_decay: the encoder '{encoder.family}' states {stated} blocks and shows {found}; leave it "
            "out"
        )
    return found
