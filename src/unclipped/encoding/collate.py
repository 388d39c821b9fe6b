"""Encoded examples to batches: right padding for training, left padding for generation, masks for shared images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclipped.encoding.chat import IGNORED
from unclipped.encoding.examples import Example


def pad_token_id_of(processor: Any) -> int:
    """The id that fills padding; masked positions never see it, so a tokenizer without one lends its eos, or 0."""
    tokenizer = getattr(processor, "tokenizer", processor)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


@dataclass(frozen=True)
class Collator:
    """Training batches of encoded examples, padded on the right.

    Gives `input_ids`, `labels`, `position_ids` int64 (batch, length), `sample_ids` (a list of names, one a row), with
    images `pixel_values` (sum_patches, channels * patch height * patch width) and `image_grid_thw` (num_images, 3),
    and `attention_mask`: int64 (batch, length), or bool (batch, 1, length, length), True where a position may attend,
    when a row shares an image between questions. `length` is rounded up to a multiple of `pad_to_multiple`.
    """

    pad_token_id: int
    pad_to_multiple: int = 1

    @classmethod
    def for_processor(cls, processor: Any, *, pad_to_multiple: int = 1) -> Collator:
        """The collator that pads with the processor's padding token."""
        return cls(pad_token_id_of(processor), pad_to_multiple)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        longest = max(len(example.input_ids) for example in examples)
        length = -(-longest // self.pad_to_multiple) * self.pad_to_multiple
        shape = (len(examples), length)
        input_ids = torch.full(shape, self.pad_token_id)  # (batch, length)
        labels = torch.full(shape, IGNORED)
        valid = torch.zeros(shape, dtype=torch.int64)
        position_ids = torch.arange(length).repeat(len(examples), 1)
        for row, example in enumerate(examples):
            size = len(example.input_ids)
            input_ids[row, :size] = torch.tensor(example.input_ids)
            labels[row, :size] = torch.tensor(example.labels)
            valid[row, :size] = 1
            if example.positions is not None:
                position_ids[row, :size] = torch.tensor(example.positions)
                position_ids[row, size:] = 0
        shared = any(example.segments is not None for example in examples)
        return {
            "input_ids": input_ids,
            "attention_mask": shared_image_mask([example.segments for example in examples], valid) if shared else valid,
            "position_ids": position_ids,
            "labels": labels,
            **_images(examples),
            "sample_ids": [example.id for example in examples],
        }


def shared_image_mask(segments: Sequence[list[int] | None], valid: Tensor) -> Tensor:
    """Who may attend to whom: bool (batch, 1, length, length), True where query i may see key j.

    j ≤ i, j is no padding, and j lies in the shared part (segment 0) or in i's own segment. A padded query sees
    itself alone, so that its softmax has something to sum over. valid: (batch, length).
    """
    batch, length = valid.shape
    segment = torch.zeros(batch, length, dtype=torch.int64)
    for row, values in enumerate(segments):
        if values is not None:
            segment[row, : len(values)] = torch.tensor(values)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    related = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # (batch, query, key)
    seen = causal & related & valid.bool()[:, None, :] & valid.bool()[:, :, None]
    return (seen | torch.eye(length, dtype=torch.bool))[:, None]  # (batch, 1, length, length)


def collate_prompts(examples: Sequence[Example], processor: Any) -> dict[str, Any]:
    """Prompts for `generate`, padded on the left: `input_ids`, `attention_mask` int64 (batch, length), and images.

    Positions are left to the model, which counts them from the mask.
    """
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id_of(processor))  # (batch, length)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.int64)
    for row, example in enumerate(examples):
        start = length - len(example.input_ids)
        input_ids[row, start:] = torch.tensor(example.input_ids)
        attention_mask[row, start:] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, **_images(examples)}


def _images(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Patches and grids of all examples in order; nothing when there is no image."""
    pixels = [example.pixel_values for example in examples if example.pixel_values is not None]
    grids = [example.image_grid_thw for example in examples if example.image_grid_thw is not None]
    if not pixels:
        return {}
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
