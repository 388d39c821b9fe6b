"""Placing visual tokens: which placeholders receive which image, checked for each sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unclipped.core.errors import DataError


def check_placeholders(
    placeholders: Sequence[int],
    image_tokens: Sequence[int],
    sample_ids: Sequence[object] | None = None,
) -> list[int]:
    """Images of each row, when every row's placeholders hold whole consecutive images; all numbers are CPU ints.

    placeholders: image tokens in each row of `input_ids`; image_tokens: visual tokens of each image, in order.
    Raises DataError that names the row (and the sample when `sample_ids` are given), expected and found.
    """
    images_of_row: list[int] = []
    image = 0
    for row, found in enumerate(placeholders):
        expected, first = 0, image
        while expected < found and image < len(image_tokens):
            expected += image_tokens[image]
            image += 1
        if expected != found:
            counts = ", ".join(str(n) for n in image_tokens[first:image]) or "none left"
            raise DataError(
                f"{_row_name(row, sample_ids)}: found {found} image placeholders, but the next images give "
                f"{expected} visual tokens ({counts}); prepare text and images together with the model's processor, "
                "and do not truncate inside an image"
            )
        images_of_row.append(image - first)
    if image != len(image_tokens):
        raise DataError(
            f"batch: {len(image_tokens) - image} of {len(image_tokens)} images have no placeholders in any row; "
            "give one image token in the text for each image"
        )
    return images_of_row


def _row_name(row: int, sample_ids: Sequence[object] | None) -> str:
    return f"sample {sample_ids[row]} (row {row})" if sample_ids is not None else f"row {row}"


def place_features(inputs_embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """`inputs_embeds` (B, L, H) with `features` (n, H) in the n places where `mask` (B, L) is true, in order."""
    features = features.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1).expand_as(inputs_embeds), features)


def usable_mask(attention_mask: Any, implementation: str | None, dtype: torch.dtype) -> Any:
    """A 4-D boolean mask (B, 1, Lq, Lk; true = may attend) in the form that the decoder's attention takes.

    A position that may attend nowhere (padding) attends to itself: softmax over nothing is not a number, and it would
    reach every gradient. Eager attention adds its mask, so it gets 0 and the most negative number instead.
    Anything else (no mask, other ranks, the masks a kind of layer that `generate` prepares) passes unchanged. Raises
    DataError for attention that takes no dense mask.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4 or attention_mask.dtype != torch.bool:
        return attention_mask
    if implementation is not None and "flash" in implementation:
        raise DataError(
            f"a 4-D attention mask needs attention 'sdpa', 'eager' or 'flex_attention', found '{implementation}'"
        )
    mask, (queries, keys) = attention_mask, attention_mask.shape[-2:]
    if queries == keys:
        itself = torch.eye(queries, dtype=torch.bool, device=mask.device)
        mask = mask | (~mask.any(dim=-1, keepdim=True) & itself)
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask
