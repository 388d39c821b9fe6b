"""Text for language modelling: documents from files, a part held out, and blocks of tokens drawn by index."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from unclipped.core.config import Count, Decay, FrozenConfig, Name, PathText, Seed
from unclipped.core.documents import MAX_LINE_BYTES, parse_json, regular_file
from unclipped.core.errors import DataError
from unclipped.data.control_tokens import Piece, TextTokens
from unclipped.data.sample import Sample

SUFFIXES = (".txt", ".txt.gz", ".md", ".jsonl", ".jsonl.gz")


class TextConfig(FrozenConfig):
    """Where text comes from and how it falls into documents."""

    paths: Annotated[tuple[PathText, ...], Field(min_length=1, max_length=100_000)]
    """Files, folders (searched through), or globs, of .txt, .txt.gz, .md, .jsonl or .jsonl.gz files."""
    exclude: Annotated[tuple[PathText, ...], Field(max_length=1000)] = ()
    """Globs of file names or paths to leave out."""
    field: Name = "text"
    """The field of a JSONL row that holds the text; each row is one document."""
    document_characters: Count = 4096
    """Plain text is cut at the first blank line after so many characters (at any line break after twice as many)."""
    holdout_share: Decay = 0.0
    """Share of the documents on the `dev` side, chosen by the hash of the document's place."""
    seed: Seed = 0
    """Another seed holds out other documents."""


def text_files(config: TextConfig) -> list[Path]:
    """The files that `config` names, sorted, each once. Raises DataError when a path names none."""
    found: dict[Path, None] = {}
    for pattern in config.paths:
        path = Path(pattern)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.name.endswith(SUFFIXES)]
        elif path.is_file():
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
        if not files:
            raise DataError(f"text {pattern}: no such file, or no {', '.join(SUFFIXES)} file in it")
        kept = [file for file in files if not _excluded(file, config.exclude)]
        found.update(dict.fromkeys(kept))
    if not found:
        raise DataError(f"text {', '.join(config.paths)}: exclude leaves no file")
    return list(found)


def _excluded(file: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file.name, pattern) or fnmatch(str(file), pattern) for pattern in patterns)


def iterate_documents(config: TextConfig, side: Literal["all", "train", "dev"] = "all") -> Iterator[str]:
    """Documents in file order, one in memory at a time. Raises DataError that names a damaged file and line."""
    for file in text_files(config):
        for number, document in enumerate(_documents(file, config)):
            if side != "all" and (_held_out(file.name, number, config) != (side == "dev")):
                continue
            yield document


def _held_out(name: str, number: int, config: TextConfig) -> bool:
    digest = hashlib.blake2b(f"{config.seed}\n{name}\n{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < config.holdout_share * 2**64


def _documents(file: Path, config: TextConfig) -> Iterator[str]:
    is_json = file.name.removesuffix(".gz").endswith(".jsonl")
    lines = _lines(file)
    yield from (_rows(file, lines, config.field) if is_json else _chunks(lines, config.document_characters))


def _lines(file: Path) -> Iterator[str]:
    """Lines without a byte order mark. Raises DataError for a file that cannot be read or a line beyond the limit."""
    regular_file(file)
    try:
        opened = partial(gzip.open, mode="rt") if file.suffix == ".gz" else open
        with opened(file, encoding="utf-8-sig") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{file}: a line longer than {MAX_LINE_BYTES:,} characters; exclude or split it")
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); copy it again or exclude it") from None


def _rows(file: Path, lines: Iterator[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parse_json(line.rstrip(), where, remedy="repair that line")
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise DataError(f"{where}: no text in field '{field}'; set field to the one that holds it")
        if row[field].strip():
            yield row[field]


def _chunks(lines: Iterator[str], characters: int) -> Iterator[str]:
    gathered: list[str] = []
    size = 0
    for line in lines:
        gathered.append(line)
        size += len(line)
        if size >= 2 * characters or (size >= characters and not line.strip()):
            document = "".join(gathered).strip()
            gathered, size = [], 0
            if document:
                yield document
    if document := "".join(gathered).strip():
        yield document


def render_documents(samples: Iterable[Sample], processor: Any) -> Iterator[tuple[Piece, ...]]:
    """Samples as the text that the chat template makes of them, images left out: text in a task's own format.

    Each in pieces, so that the template's control tokens are known from typed ones. An end-of-text token at the end is
    left out.
    """
    from unclipped.data.chat import encoder_of
    from unclipped.data.template import ImageSlot, structure_of, texts_of

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
