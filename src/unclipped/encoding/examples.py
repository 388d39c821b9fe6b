"""Samples to token ids and labels, built piece by piece: what is supervised is known when it is written.

A sequence is what the chat template makes of the turns. Each stretch between images and answers is tokenised once,
each answer once; image placeholders are written as ids, as many as the connector gives tokens. Supervised are the
answers and what ends them: the template's tokens through the first special one or, when it writes none, the
tokenizer's end of text, which is then added after each answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from unclipped.core.errors import DataError
from unclipped.data.sample import Sample, SampleGroup
from unclipped.encoding.chat import IGNORED, ChatEncoder, encoder_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("unclipped.data")


@dataclass(frozen=True)
class Example:
    """An encoded row.

    `segments` is None for an ordinary row. In a row of several question blocks behind shared images it is 0 in the
    shared part and k = 1, 2, … in block k; a position sees the shared part and its own block, and `positions`
    restart.
    """

    id: str
    input_ids: list[int]  # (length,)
    labels: list[int]  # (length,), IGNORED where not supervised
    pixel_values: Tensor | None = None  # (sum_patches, channels * patch height * patch width)
    image_grid_thw: Tensor | None = None  # (num_images, 3)
    segments: list[int] | None = None  # (length,)
    positions: list[int] | None = None  # (length,); None: 0, 1, 2, …
    sample_ids: tuple[str, ...] = ()
    truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Positions that enter the loss."""
        return len(self.labels) - self.labels.count(IGNORED)


def encode(item: Sample | SampleGroup, processor: Any, *, max_length: int | None = None) -> Example:
    """Encode a sample or a group of samples about the same images."""
    if isinstance(item, SampleGroup):
        return encode_group(item, processor, max_length=max_length)
    return encode_sample(item, processor, max_length=max_length)


def position_limit(model: Any) -> int | None:
    """Positions that the decoder of a model has, learned or rotary; None where it names none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_positions(example: Example, limit: int | None) -> Example:
    """`example` itself. Raises DataError naming it when a token stands beyond the decoder's `limit` positions."""
    used = len(example.input_ids) if example.positions is None else max(example.positions) + 1
    if limit is not None and used > limit:
        raise DataError(
            f"sample {example.id}: a row of {used} tokens does not fit in the model's {limit} positions; shorten it, "
            "set max_length or lower the image budget"
        )
    return example


def encode_sample(sample: Sample, processor: Any, *, max_length: int | None = None) -> Example:
    """A sample for training. `processor` may be a plain tokenizer when there are no images.

    A row longer than `max_length` first loses its oldest exchanges (question and answer, never the last and never one
    with an image); if that is not enough, the end of the last answer is cut. Raises DataError naming the sample when it
    has no answer, when the cut would fall into or before an image, or when nothing supervised would be left.
    """
    encoder = encoder_of(processor)
    pixels, grid, counts = encoder.images(sample.images, sample.id)
    ids, labels = encoder.tokens(sample, counts)
    truncated = False
    if max_length is not None and len(ids) > max_length:
        ids, labels = _truncated(encoder, sample, counts, ids, labels, max_length)
        truncated = True
    return _example(sample.id, ids, labels, pixels, grid, truncated=truncated)


def encode_prompt(sample: Sample, processor: Any) -> Example:
    """The sample up to where its last answer begins, for generation: a prefix of what `encode_sample` gives."""
    encoder = encoder_of(processor)
    pixels, grid, counts = encoder.images(sample.images, sample.id)
    ids, _ = encoder.tokens(sample, counts, prompt=True)
    return Example(sample.id, ids, [IGNORED] * len(ids), pixels, grid, sample_ids=(sample.id,))


def encode_group(group: SampleGroup, processor: Any, *, max_length: int | None = None) -> Example:
    """Several independent samples about the same images in one row: the longest common beginning once, then each rest.

    The shared part ends before the token that precedes the first answer, so that every block begins unsupervised and
    its loss is that of the sample alone. Raises DataError when the images do not lie in the shared part or the row is
    longer than `max_length`.
    """
    if len(group.samples) == 1:
        return encode_sample(group.samples[0], processor, max_length=max_length)
    encoder = encoder_of(processor)
    pixels, grid, counts = encoder.images(group.images, group.id)
    rows = [encoder.tokens(sample, counts) for sample in group.samples]
    shared = _common_beginning([ids for ids, _ in rows])
    shared = min(shared, *(_first_supervised(labels) - 1 for _, labels in rows))
    if counts and sum(1 for token in rows[0][0][: max(shared, 0)] if token == encoder.image_token_id) != sum(counts):
        raise DataError(
            f"samples {group.id}: they share an image but something unlike stands before it, so it cannot be shared; "
            "put the image before the question or set share_image to false"
        )
    shared = max(shared, 0)
    ids = list(rows[0][0][:shared])
    labels = [IGNORED] * shared
    segments = [0] * shared
    positions = list(range(shared))
    for block, (block_ids, block_labels) in enumerate(rows, start=1):
        if block_labels[shared] != IGNORED:
            raise DataError(f"samples {group.id}: nothing stands before an answer to share; set share_image to false")
        ids += block_ids[shared:]
        labels += block_labels[shared:]
        segments += [block] * (len(block_ids) - shared)
        positions += range(shared, len(block_ids))
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"samples {group.id}: {len(ids)} tokens in one row of {len(rows)} questions, max_length is {max_length}; "
            "raise max_length or lower max_group"
        )
    example = _example(group.id, ids, labels, pixels, grid)
    return replace(
        example, segments=segments, positions=positions, sample_ids=tuple(sample.id for sample in group.samples)
    )


def _example(
    name: str, ids: list[int], labels: list[int], pixels: Tensor | None, grid: Tensor | None, *, truncated: bool = False
) -> Example:
    return Example(name, ids, labels, pixels, grid, sample_ids=(name,), truncated=truncated)


def _first_supervised(labels: Sequence[int]) -> int:
    return next(index for index, label in enumerate(labels) if label != IGNORED)


def _common_beginning(rows: list[list[int]]) -> int:
    shortest = min(rows, key=len)
    for index, token in enumerate(shortest):
        if any(row[index] != token for row in rows):
            return index
    return len(shortest)


def _truncated(
    encoder: ChatEncoder, sample: Sample, counts: list[int], ids: list[int], labels: list[int], max_length: int
) -> tuple[list[int], list[int]]:
    found = len(ids)
    shorter: Sample | None = sample
    while len(ids) > max_length and (shorter := _without_oldest_exchange(shorter)) is not None:
        ids, labels = encoder.tokens(shorter, counts)
        sample = shorter
    if len(ids) > max_length:
        last_image = max((i for i, token in enumerate(ids) if token == encoder.image_token_id), default=-1)
        if counts and last_image >= max_length:
            raise DataError(
                f"sample {sample.id}: {found} tokens, max_length is {max_length}, and the cut would "
                f"fall into or before an image ({sum(counts)} image tokens); raise max_length or lower the image budget"
            )
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(
                f"sample {sample.id}: {found} tokens, max_length is {max_length}: no supervised token would be left; "
                "raise max_length"
            )
    logger.info("sample %s: shortened from %d to %d tokens (max_length %d)", sample.id, found, len(ids), max_length)
    return ids, labels


def _without_oldest_exchange(sample: Sample | None) -> Sample | None:
    """The sample without its first user turn that has no image and all that follows up to the next user turn."""
    if sample is None:
        return None
    starts = [index for index, turn in enumerate(sample.turns) if turn.role == "user"]
    for start, end in pairwise(starts):
        if not any(turn.images for turn in sample.turns[start:end]):
            return replace(sample, turns=sample.turns[:start] + sample.turns[end:])
    return None
