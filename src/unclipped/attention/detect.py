"""What a model is asked before it runs sparsely: whether it can, and which tokens of a call are visual."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unclipped.attention.layout import Layout
from unclipped.core.errors import UsageError
from unclipped.images.config import Grid


def layouts_of_call(
    model: PreTrainedModel,
    ids: Tensor | None,
    padding: Tensor | None,
    kwargs: dict[str, Any],
    *,
    is_cut: bool = False,
) -> tuple[Layout, ...] | str:
    """A layout for each row of `ids` (B, T), without padding, or the reason why none can be known.

    padding (B, T or more), true where a token is; None: everywhere.

    Visual tokens are those of the configuration's image or video token. Grids come from `image_grid_thw`, through the
    connector or the merge size of the model; without them an image of s·s tokens is taken as s rows, another as one.
    is_cut: the rows may go on behind, so that a single row may end inside an image. A row of padding alone is given
    one token of text.
    """
    if ids is None:
        return "called with inputs_embeds: visual tokens cannot be told from text; pass layouts to sparse_prefill"
    grids = token_grids(model, kwargs)
    visual = visual_token_ids(model.config)
    rows, used = [], 0
    for row in range(ids.shape[0]):
        tokens = ids[row]  # (T,)
        if padding is not None:
            tokens = tokens[padding[row, : ids.shape[1]].bool()]  # (n,)
        if not len(tokens):  # a chunk before the row's first token
            rows.append(Layout.from_token_types([0]))
            continue
        types = torch.isin(
            tokens, torch.tensor(visual, dtype=tokens.dtype, device=tokens.device)
        ).int()  # (n,) 1 = visual
        runs = _runs(types.tolist())
        if grids is None:
            own = [_square(length) for length in runs]
        elif is_cut and ids.shape[0] == 1:
            own = grids
        else:
            own, total = [], sum(runs)
            while total > 0 and used < len(grids):
                own.append(grids[used])
                total -= math.prod(grids[used])
                used += 1
        try:
            rows.append(Layout.from_token_types(types, own, is_cut=is_cut and grids is not None))
        except UsageError as error:  # a prompt cut inside an image (chunked prefill), or tokens of another merge
            return f"row {row}, {error}"
    return tuple(rows)


def visual_token_ids(config: Any) -> list[int]:
    """Ids of the placeholders of images and videos in a configuration; none for a text model."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return [int(token) for name in names if (token := getattr(config, name, None)) is not None]


def token_grids(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[Grid] | None:
    """(t, h, w) in tokens of each image of the call, in order; None when the call has no grids."""
    grids = kwargs.get("image_grid_thw")
    if grids is None or kwargs.get("video_grid_thw") is not None:
        return None
    listed: list[Grid] = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    connector = getattr(model.config, "connector", None)
    if hasattr(connector, "out_grid"):
        return connector.out_grid(listed)  # type: ignore[union-attr]
    merge = int(getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", 1))
    return [(t, h // merge, w // merge) for t, h, w in listed]


def _runs(types: list[int]) -> list[int]:
    """Lengths of the unbroken runs of ones."""
    runs, length = [], 0
    for kind in [*types, 0]:
        if kind:
            length += 1
        elif length:
            runs.append(length)
            length = 0
    return runs


def _square(length: int) -> Grid:
    side = math.isqrt(length)
    return (1, side, side) if side * side == length else (1, 1, length)


def key_heads_of(config: Any) -> int:
    """Key heads of a decoder's attention, by its configuration."""
    heads = getattr(config, "num_key_value_heads", None)
    return int(heads if isinstance(heads, int) else config.num_attention_heads)


def check_replaceable(model: PreTrainedModel) -> None:
    """Raise UsageError, which names the module, when the attention of `model` cannot be replaced."""
    attentions = {type(module) for module in model.modules() if "Attention" in type(module).__name__}
    for attention in sorted(attentions, key=lambda kind: kind.__name__):
        if not hasattr(sys.modules[attention.__module__], "ALL_ATTENTION_FUNCTIONS"):  # the table of the interface
            raise UsageError(
                f"{type(model).__name__}: {attention.__name__} computes its attention itself and not through "
                "transformers' attention interface, so it cannot be replaced; use a model that supports "
                "set_attn_implementation"
            )
    if not attentions:
        raise UsageError(f"{type(model).__name__}: found no attention modules that could run a pattern")
    if not model._supports_sdpa:
        raise UsageError(
            f"{type(model).__name__} does not run on scaled_dot_product_attention, to which sparse attention falls "
            "back; use a model with sdpa support"
        )
