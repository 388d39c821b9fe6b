"""Held-out text as token blocks, for perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.sample import Sample
from unclipped.data.sources import open_source
from unclipped.encoding.control_tokens import TextTokens
from unclipped.encoding.text import render_documents


@dataclass(frozen=True)
class TextBlocks:
    """Token blocks of equal length, and how many bytes of text a block holds on average."""

    blocks: Sequence[Sequence[int]]
    bytes_per_block: float | None = None


def held_out_blocks(
    sources: Sequence[SourceConfig], processor: Any, count: int = 64, *, length: int = 256, seed: int = 0
) -> TextBlocks:
    """The first `count` blocks of `length` tokens of these sources: text files, or samples without their images.

    `processor`: a processor or a tokenizer. Raises DataError when the text fills no block.
    """
    samples = (sample for config in sources for sample in _some(config, count * length, seed))
    return blocks_of(samples, processor, count, length)


def blocks_of(samples: Iterable[Sample], processor: Any, count: int, length: int) -> TextBlocks:
    """Documents joined by the end-of-text token and cut into at most `count` blocks of `length` tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = TextTokens(tokenizer)
    ids: list[int] = []
    num_bytes = 0
    for pieces in render_documents(samples, processor):
        ids += tokens.encode(pieces)
        ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        num_bytes += sum(len(text.encode()) for text, _ in pieces)
        if len(ids) >= count * length:
            break
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:count]
    if not blocks:
        raise DataError(f"held-out text: {len(ids)} tokens fill no block of {length}; give more text or shorter blocks")
    return TextBlocks(blocks, num_bytes * length / len(ids))


def _some(config: SourceConfig, most: int, seed: int) -> Iterator[Sample]:
    source = open_source(config, seed=seed)
    for index in range(most if source.length is None else source.length):
        yield source[index]
