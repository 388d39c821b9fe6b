"""Blocks of tokens for language modelling: documents rendered by the chat template, tokenised, drawn by index."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from unclipped.core.errors import DataError
from unclipped.data.sample import Sample
from unclipped.encoding.chat import encoder_of
from unclipped.encoding.control_tokens import Piece, TextTokens
from unclipped.encoding.template import ImageSlot, structure_of, texts_of


def render_documents(samples: Iterable[Sample], processor: Any) -> Iterator[tuple[Piece, ...]]:
    """Samples as the text that the chat template makes of them, images left out: text in a task's own format.

    Each in pieces, so that the template's control tokens are known from typed ones. An end-of-text token at the end is
    left out.
    """
    encoder = encoder_of(processor)
    end = encoder.tokenizer.eos_token or ""
    for sample in samples:
        if sample.turns and sample.turns[0].role == "document":
            yield ((sample.turns[0].text, False),)
            continue
        blind = sample.without_images()
        texts = texts_of(blind)
        pieces = [
            (chunk, True) if isinstance(chunk, str) else (chunk.fill(texts), False)
            for chunk in encoder.structure(structure_of(blind))
            if not isinstance(chunk, ImageSlot)  # a blind structure has none
        ]
        if pieces and pieces[-1][1]:
            pieces[-1] = (pieces[-1][0].removesuffix(end), True)
        yield tuple(pieces)


class TokenBlocks:
    """Blocks of consecutive tokens of a corpus, in a fresh order and at a fresh offset per epoch.

    `block(i)` is a pure function of the seed and i. The tokens lie in a file mapped into memory, 2 or 4 bytes each.
    """

    def __init__(self, path: str | Path, dtype: str, block_length: int, *, seed: int = 0) -> None:
        self.path, self.dtype, self.block_length, self.seed = str(path), dtype, block_length, seed
        self._tokens = np.memmap(path, dtype=dtype, mode="r")
        self.num_tokens = len(self._tokens)
        if self.num_tokens < block_length:
            raise DataError(
                f"text: {self.num_tokens} tokens, fewer than one block of {block_length}; add text or shorten the block"
            )
        self._slack = min(block_length, self.num_tokens - block_length + 1)  # offsets 0 … slack - 1
        self.blocks_per_epoch = (self.num_tokens - self._slack + 1) // block_length
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        return self.blocks_per_epoch

    def block(self, index: int) -> np.ndarray:
        """Block `index` of an endless sequence: int64 (block_length,)."""
        epoch, within = divmod(index, self.blocks_per_epoch)
        offset, order = self._epoch(epoch)
        start = offset + int(order[within]) * self.block_length
        return np.asarray(self._tokens[start : start + self.block_length]).astype(np.int64)

    def in_order(self) -> Iterator[np.ndarray]:
        """All whole blocks from the first token on, for measuring perplexity: int64 (block_length,) each."""
        for start in range(0, self.num_tokens - self.block_length + 1, self.block_length):
            yield np.asarray(self._tokens[start : start + self.block_length]).astype(np.int64)

    def _epoch_order(self, epoch: int) -> tuple[int, np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch, 3])
        return int(generator.integers(self._slack)), generator.permutation(self.blocks_per_epoch).astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "dtype": self.dtype, "block_length": self.block_length, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["dtype"], state["block_length"], seed=state["seed"])  # type: ignore[misc]


def build_token_blocks(
    documents: Iterable[str | tuple[Piece, ...]],
    tokenizer: Any,
    block_length: int,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
) -> TokenBlocks:
    """Tokenise documents one after the other, an end-of-text token after each, into a file, and open its blocks.

    Control tokens in a document are characters, but for those of a template (see `render_documents`).
    Memory stays bounded: documents are tokenised in small batches and written at once. `folder` holds the file (by
    default a temporary one that goes with the process). Raises DataError when there is too little text.
    """
    temporary = tempfile.mkdtemp(prefix="unclipped-text-") if folder is None else None
    folder = Path(temporary or folder or ".")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    handle, path = tempfile.mkstemp(dir=folder, prefix="tokens-", suffix=f".{dtype}")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no eos token to put between documents; set one")
    written = 0
    tokens = TextTokens(tokenizer)
    with os.fdopen(handle, "wb") as stream:
        for batch in _batches(documents):
            for ids in tokens.encode_all(batch):
                np.asarray([*ids, eos], dtype=dtype).tofile(stream)
                written += len(ids) + 1
    if written < block_length:
        shutil.rmtree(temporary) if temporary is not None else os.unlink(path)
        raise DataError(
            f"text: {written} tokens are fewer than one block of {block_length}; add text or shorten the block"
        )
    blocks = TokenBlocks(path, dtype, block_length, seed=seed)
    if temporary is not None:
        weakref.finalize(blocks, _remove, temporary, os.getpid())
    return blocks


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a forked worker that lets go of its copy must not take the file from the others
        shutil.rmtree(folder, ignore_errors=True)


def _batches(
    documents: Iterable[str | tuple[Piece, ...]], characters: int = 1 << 18
) -> Iterator[list[tuple[Piece, ...]]]:
    batch: list[tuple[Piece, ...]] = []
    size = 0
    for document in documents:
        pieces = ((document, False),) if isinstance(document, str) else document
        batch.append(pieces)
        size += sum(len(text) for text, _ in pieces)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
