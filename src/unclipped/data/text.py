"""Text files for language modelling: documents in file order, and a part held out."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from unclipped.core.config import Count, Decay, FrozenConfig, Name, PathText, Seed
from unclipped.core.documents import MAX_LINE_BYTES, parse_json, regular_file
from unclipped.core.errors import DataError

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
