"""Captions as rows of token ids: what text towers and caption decoders read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unclipped.core.errors import DataError, UsageError
from unclipped.encoding.chat import encoder_of


@dataclass(frozen=True)
class CaptionTokens:
    """A tokenizer with the longest row it may give. A row is a caption's tokens and the end-of-text token."""

    tokenizer: Any
    context_length: int
    """Longest row in tokens."""
    long_captions: Literal["refuse", "cut"] = "refuse"
    """What becomes of longer ones."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UsageError("tokenizer: it has no end-of-text token, with which every caption ends; take another one")

    @property
    def end(self) -> int:
        """The end-of-text token; it also stands where a decoder starts."""
        return int(self.tokenizer.eos_token_id)

    def row(self, caption: str, name: str) -> list[int]:
        """Token ids of one caption. Raises DataError calling it `name` when it is empty, or too long and not cut."""
        if not caption.strip():
            raise DataError(f"{name}: the caption is empty; add the text or remove the row")
        try:
            ids = [*encoder_of(self.tokenizer).text.encode(((caption, False),)), self.end]
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        if len(ids) <= self.context_length:
            return ids
        if self.long_captions == "refuse":
            raise DataError(
                f"{name}: the caption has {len(ids)} tokens, more than pairs.context_length {self.context_length}; "
                "raise it, or set pairs.long_captions=cut"
            )
        return [*ids[: self.context_length - 1], self.end]

    def batch(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows padded on the right: ids int64 (B, T) and mask int64 (B, T), 1 where a token is."""
        length, padding = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return ids, mask
