"""Auxiliary CTC loss: the encoder's tokens, read in order through a linear head, must spell the answer.

It gives the encoder a direct signal to put glyphs in order long before the decoder listens, and its head is dropped
when the model is saved. Loss: Graves et al. 2006, as torch computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclipped.core.errors import DataError
from unclipped.models.placing import check_placeholders

IGNORED = -100
_ROWS_BEFORE_GIVING_UP = 512


@dataclass(frozen=True)
class Reading:
    """One answer to be read off one image."""

    image: int
    """Index of the image in the batch."""
    target: list[int]
    """Token ids of the answer without special tokens."""


def answer_tokens(labels: Sequence[int], positions: Sequence[int] | None, special: frozenset[int]) -> list[int] | None:
    """The ids of a row's only answer, without special tokens.

    None when the row has several answers: a conversation, or question blocks whose positions restart.
    """
    runs = [
        [label for _, label in run]
        for is_answer, run in groupby(enumerate(labels), key=lambda pair: pair[1] != IGNORED)
        if is_answer
    ]
    if len(runs) != 1:
        return None
    if positions is not None:
        last = max(index for index, label in enumerate(labels) if label != IGNORED)
        if any(b <= a for a, b in pairwise(positions[: last + 1])):
            return None
    return [label for label in runs[0] if label not in special]


def needed_frames(target: Sequence[int]) -> int:
    """Fewest frames in which CTC can write `target`: a blank must stand between equal neighbours."""
    return len(target) + sum(a == b for a, b in pairwise(target))


class CTCHead(nn.Module):
    """A linear layer from encoder features to the vocabulary and a blank (the last class), with its loss."""

    def __init__(self, hidden_size: int, vocabulary_size: int, *, special: frozenset[int], image_token_id: int) -> None:
        super().__init__()
        self.classes = nn.Linear(hidden_size, vocabulary_size + 1)
        self.blank, self.special, self.image_token_id = vocabulary_size, special, image_token_id
        self._rows_seen = self._rows_read = 0

    def readings(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        image_grid_thw: Tensor | None,
        tokens_per_image: Sequence[int],
    ) -> tuple[list[Reading], int]:
        """The rows of a batch that CTC can be computed for, and the number of rows that have images.

        Left out (the answer loss still trains on them): rows with several images or several answers, answers of
        special tokens only, and answers that need more frames than the encoder gives tokens.
        """
        if image_grid_thw is None or len(image_grid_thw) == 0:
            return [], 0
        frames = image_grid_thw.prod(dim=1).tolist()  # encoder tokens of each image
        placeholders = (input_ids == self.image_token_id).sum(dim=1).tolist()
        images_of_row = check_placeholders(placeholders, tokens_per_image)
        all_labels = labels.tolist()
        all_positions = position_ids.tolist() if position_ids is not None else [None] * len(all_labels)
        found, first = [], 0
        for row, count in enumerate(images_of_row):
            if count == 1:
                target = answer_tokens(all_labels[row], all_positions[row], self.special)
                if target and needed_frames(target) <= frames[first]:
                    found.append(Reading(first, target))
            first += count
        return found, sum(count > 0 for count in images_of_row)

    def forward(self, features: Tensor, image_grid_thw: Tensor, readings: Sequence[Reading]) -> Tensor:
        """Sum over `readings` of the loss per answer token. features: (sum of patches, hidden), row-major per image."""
        if not readings:
            return features.sum() * 0.0 + sum(p.sum() for p in self.parameters()) * 0.0
        images = features.split(image_grid_thw.prod(dim=1).tolist())
        scores = nn.utils.rnn.pad_sequence([self.classes(images[r.image]) for r in readings])  # (frames, n, classes)
        targets = torch.tensor([token for r in readings for token in r.target], device=features.device)
        frames = torch.tensor([len(images[r.image]) for r in readings])
        lengths = torch.tensor([len(r.target) for r in readings])
        losses = F.ctc_loss(  # (n,)
            scores.float().log_softmax(dim=-1), targets, frames, lengths, blank=self.blank, reduction="none"
        )
        return (losses / lengths.to(losses.device)).sum()

    def note(self, rows: int, read: int) -> None:
        """Keep account of a batch. Raises DataError when no row of the first hundreds could be used."""
        self._rows_seen += rows
        self._rows_read += read
        if self._rows_read == 0 and self._rows_seen >= _ROWS_BEFORE_GIVING_UP:
            raise DataError(
                f"auxiliary ctc: none of the first {self._rows_seen} rows has one image and one answer that fits into "
                "the encoder's tokens; remove ctc from the stage, or give images more tokens"
            )
