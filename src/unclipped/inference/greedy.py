"""Greedy decoding, step by step, with the cache that transformers provides.

`generate` of transformers gives the same tokens. At the sizes trained here its bookkeeping takes longer than the
model, so batches go through this loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def greedy_steps(
    model: Any, inputs: dict[str, Any], *, max_new_tokens: int, end_ids: Tensor, suppressed_ids: Tensor
) -> Iterator[Tensor]:
    """Yield the next token of every row, (batch,) int64, until all rows have ended or `max_new_tokens` are written.

    inputs: `input_ids` and `attention_mask` (batch, length), padded on the left, and the images. end_ids: tokens that
    end a row; a row that has ended repeats its end token. suppressed_ids: tokens that are never written.
    """
    from transformers import DynamicCache

    mask: Tensor = inputs["attention_mask"]
    has_padding = not bool(mask.all())
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)  # (batch, length): positions count from the first real token
    cache = DynamicCache(config=model.config.get_text_config())
    is_done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    step_inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    token = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    for step in range(max_new_tokens):
        with torch.inference_mode():
            logits = model(
                **step_inputs,
                # Without padding the causal mask is all there is, and attention may take its fast path.
                attention_mask=mask if has_padding else None,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # (batch, vocabulary)
            logits[:, suppressed_ids] = float("-inf")
            token = torch.where(is_done, token, logits.argmax(dim=-1))
            is_done |= torch.isin(token, end_ids)
            step_inputs = {"input_ids": token[:, None]}
            position_ids = position_ids[:, -1:] + 1
            if has_padding:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        yield token
        if step + 1 < max_new_tokens and bool(is_done.all()):
            return


def up_to_end(tokens: list[int], end_ids: set[int]) -> list[int]:
    """The tokens before the first end token."""
    for place, token in enumerate(tokens):
        if token in end_ids:
            return tokens[:place]
    return tokens
