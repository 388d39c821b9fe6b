"""An index of a tar shard: where the members of each sample lie, so that any sample is read by its number.

A shard is scanned once: its headers are read one after the other and members are grouped by key as the webdataset
layout groups them (neighbours whose paths agree up to the first dot of the file name). The index is an array of one
record a sample, kept as a file in the cache folder and mapped into memory, so that millions of samples take no memory
until they are read.

Why an index and not `datasets` in streaming mode, which reads the same layout: a stream has a position and a shuffle
buffer that are state. To resume it is to read again what was read before, or to lose the buffer; to split it over
processes and workers, shards must outnumber them. With an index a sample is a pure function of its number, as
everywhere here, and exact resume, splits over any number of processes, parts and limits follow. Shuffling in a window
(`unclipped.data.order`) keeps the reads as near to each other as a stream's, without holding a buffer of samples. The
tests hold keys, images and captions to those that `datasets` reads.

Nothing is dropped in silence: a damaged stretch, a shard that is cut or holds no sample, and a key that comes twice are
records too, with a `trouble`, which raise when they are read; so `on_bad_sample` governs them like any bad sample.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unclipped.core.documents import regular_file
from unclipped.core.errors import DataError, UnclippedError, guarded
from unclipped.core.files import cache_folder, read_array, write_array

logger = logging.getLogger("unclipped.data")

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "caption")
ROLES = ("image", "text", "json")
_KINDS = dict.fromkeys(IMAGE_SUFFIXES, "image") | dict.fromkeys(TEXT_SUFFIXES, "text") | {"json": "json"}
MOST_DAMAGE = 1000
"""Damaged headers after which the rest of a shard is not read."""
MOST_EXTENSIONS = 16
"""Headers that extend the next one (long names, pax fields) in a row; the tar reader recurses over them."""
MOST_KEY_BYTES = 4096
"""Length of a key; a member with a longer one is damage."""
_VERSION = 2
_BLOCK = tarfile.BLOCKSIZE
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

FINE, DAMAGED, UNFINISHED, EMPTY, REPEATED, TWICE, DOTTED, SPARSE, TOO_MANY = range(9)
"""Values of `trouble`: none; a damaged stretch; no end mark; no sample; a key that came before; two of one kind; no
image, but members with dots in their names; a sparse member; more damage than is worth reading on."""


def index_of(path: Path) -> np.ndarray:
    """The index of a shard, from the cache folder or by a scan: records (samples,), mapped read-only.

    Fields: `key`, `trouble`, and for each of image, text and json `_at` (byte offset), `_bytes` (-1: no such member)
    and `_suffix`. Raises DataError when the file cannot be read, is compressed or is no tar archive.
    """
    regular_file(path)
    try:
        status = path.stat()
        name = f"{os.path.abspath(path)}\n{status.st_size}\n{status.st_mtime_ns}\n{_VERSION}"
        cached = cache_folder("shards") / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.npy"
        try:
            if cached.is_file():
                return _cached_index(cached)
        except DataError as error:
            logger.warning("%s: the cached index of %s is damaged (%s) and is made again", cached, path, error)
        with open(path, "rb") as stream:
            records = _scan(stream, status.st_size, path)
    except OSError as error:
        raise DataError(f"shard {path}: cannot be read ({error.strerror or error})") from None
    count = int((records["trouble"] != FINE).sum()) + int(_is_cut(records, status.st_size).sum())
    if count:
        logger.warning("shard %s: %d of %d samples are damaged; reading one names it", path, count, len(records))
    try:
        write_array(cached, records)
    except OSError as error:
        logger.warning("%s cannot be written (%s): %s is scanned again in every run", cached, error, path)
        return records
    return read_array(cached, mapped=True)


def _cached_index(file: Path) -> np.ndarray:
    """The index in a file. Raises DataError when it is none."""
    records = read_array(file, mapped=True)
    names = {"key", "trouble", *(f"{role}_{part}" for role in ROLES for part in ("at", "bytes", "suffix"))}
    if records.ndim != 1 or set(records.dtype.names or ()) != names:
        raise DataError(f"{file}: holds no index of a shard; remove it")
    return records


def _is_cut(records: np.ndarray, size: int) -> np.ndarray:
    """Which samples have a member that reaches beyond the end of the file, (samples,)."""
    return np.any([records[f"{role}_at"] + records[f"{role}_bytes"] > size for role in ROLES], axis=0)


def _scan(stream: BinaryIO, size: int, path: Path) -> np.ndarray:
    """Records of all samples, in the order of the archive."""
    start = stream.read(6)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"shard {path}: compressed with {kind}; reading any sample by its place needs a plain tar: "
                "decompress the shard (images gain nothing by compression)"
            )
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    members = 0
    current: dict[str, Any] | None = None  # the sample whose members may go on
    for item in _members(stream, size):
        if not isinstance(item, tarfile.TarInfo):  # damage, or no end mark: a record that raises when it is read
            trouble, at = (UNFINISHED, size) if item is None else (DAMAGED, item)
            if item is not None and sum(row["trouble"] == DAMAGED for row in rows) >= MOST_DAMAGE:
                rows.append({"key": "", "trouble": TOO_MANY, "image_at": at})
                break
            rows.append({"key": "" if current is None else current["key"], "trouble": trouble, "image_at": at})
            continue
        members += 1
        found = _NAME.fullmatch(item.name)
        is_sparse = item.issparse() or any(name.startswith("GNU.sparse.") for name in item.pax_headers)
        if not (item.isreg() or is_sparse) or found is None:
            continue  # folders, links and hidden files are no part of a sample
        key, suffix = found.groups()
        if current is None or current["key"] != key:
            current = {"key": key, "trouble": REPEATED if key in seen else FINE}
            rows.append(current)
            seen.add(key)
        _add(current, suffix, item, is_sparse)
    for row in rows:
        if row.pop("dotted", False) and "image_at" not in row:
            row["trouble"] = row["trouble"] or DOTTED
    if rows and not members:
        raise DataError(f"shard {path}: not a tar archive; expected members KEY.jpg, KEY.txt and the like")
    if not any(row["trouble"] == FINE for row in rows):
        rows.append({"key": "", "trouble": EMPTY})
    return _table(rows)


def _add(row: dict[str, Any], suffix: str, member: tarfile.TarInfo, is_sparse: bool) -> None:
    """Note a member in its sample; members of other kinds are left out."""
    role = _KINDS.get(suffix.lower())
    if role is None:
        row["dotted"] = row.get("dotted", False) or _KINDS.get(suffix.lower().rpartition(".")[2]) == "image"
        return
    if is_sparse:
        row["trouble"] = row["trouble"] or SPARSE
        return
    if f"{role}_at" in row:
        if role == "text" and row["text_suffix"].lower() != suffix.lower():  # KEY.txt stands before KEY.caption
            if suffix.lower() != "txt":
                return
        else:
            row["trouble"] = row["trouble"] or TWICE
            return
    row |= {f"{role}_at": member.offset_data, f"{role}_bytes": member.size, f"{role}_suffix": suffix}


class _Clipped:
    """A stream of which no more can be asked than the file has, as the sizes in damaged headers would."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._stream.tell())
        return self._stream.read(left if count < 0 else min(count, left))

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(min(position, self._size), whence)

    def tell(self) -> int:
        return self._stream.tell()


def _members(stream: BinaryIO, size: int) -> Iterator[tarfile.TarInfo | int | None]:
    """Members in order; an int is where a damaged stretch begins, None an archive that stops without its end mark.

    After an unreadable header the scan resumes at the next one. Blocks of zeros end an archive, and another may follow
    (archives written one behind the other).
    """
    reader: Any = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * _BLOCK)))  # an empty archive, only for its settings
    reader.fileobj = _Clipped(stream, size)
    position, ended = 0, size == 0
    while position < size:
        stream.seek(position)
        try:
            _refuse_chain(stream, position)
            with guarded(_Unreadable):
                member = _member_at(reader)
        except _Unreadable:
            yield position
            position, ended = _next_header(stream, position + _BLOCK), True
            continue
        if member is None:
            position, ended = position + _BLOCK, True
            continue
        if reader.offset <= position or member.size < 0 or len(member.name) > MOST_KEY_BYTES:
            yield position
            position, ended = _next_header(stream, position + _BLOCK), True
            continue
        position, ended = reader.offset, False
        is_cut = member.offset_data + member.size > size
        member.size = min(member.size, size + 1)  # a declared size may be beyond any file's
        yield member
        if is_cut:
            return  # the member itself is cut, which reading it says
    if not ended:
        yield None


class _Unreadable(UnclippedError):
    """A header that the tar reader refuses, in whichever way."""


def _refuse_chain(stream: BinaryIO, position: int) -> None:
    """Raise where more than MOST_EXTENSIONS headers in a row extend the next one; the stream is left at `position`."""
    at = position
    for _ in range(MOST_EXTENSIONS + 1):
        stream.seek(at)
        block = stream.read(_BLOCK)
        if block[156:157] not in _EXTENSIONS or not _is_header(block):
            break
        with guarded(_Unreadable):
            size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        at += _BLOCK + max(0, -(-size // _BLOCK) * _BLOCK)
    else:
        raise _Unreadable("too many headers in a row that extend the next one")
    stream.seek(position)


def _member_at(reader: Any) -> tarfile.TarInfo | None:
    """The member at the reader's position; None for a block of zeros."""
    try:
        return tarfile.TarInfo.fromtarfile(reader)
    except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
        return None


def _next_header(stream: BinaryIO, position: int) -> int:
    """The first block from `position` on that is a valid header, or the end of the file."""
    stream.seek(position)
    while block := stream.read(_BLOCK):
        if _is_header(block):
            return position
        position += len(block)
    return position


def _is_header(block: bytes) -> bool:
    """Whether a block is a header that can be read, and not a damaged one."""
    if block[257:262] != b"ustar":
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _fields(key_bytes: int) -> list[tuple[str, str]]:
    fields = [("key", f"S{key_bytes}"), ("trouble", "u1")]
    for role in ROLES:
        fields += [(f"{role}_at", "i8"), (f"{role}_bytes", "i8"), (f"{role}_suffix", "S7")]
    return fields


def _table(rows: list[dict[str, Any]]) -> np.ndarray:
    keys = [row["key"].encode("utf-8", "surrogateescape") for row in rows]
    records = np.zeros(len(rows), dtype=_fields(max(1, *map(len, keys))))
    records["key"] = keys
    records["trouble"] = [row["trouble"] for row in rows]
    for role in ROLES:
        records[f"{role}_at"] = [row.get(f"{role}_at", 0) for row in rows]
        records[f"{role}_bytes"] = [row.get(f"{role}_bytes", -1) for row in rows]
        records[f"{role}_suffix"] = [row.get(f"{role}_suffix", "").encode() for row in rows]
    return records
