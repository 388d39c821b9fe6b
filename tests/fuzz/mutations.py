"""Mutations for fuzz tests: structured values, bytes and tar headers, drawn by hypothesis; a bound on each run."""

from __future__ import annotations

import copy
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from unclipped.core.errors import UnclippedError

T = TypeVar("T")

EXAMPLES = int(os.environ.get("UNCLIPPED_FUZZ", "25"))
"""Inputs of each kind. `UNCLIPPED_FUZZ=5000 python -m pytest tests/fuzz` is the long run."""
SECONDS = 20
"""No input may take longer."""

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

ODD = (
    None, True, False, 0, -1, 1, 2**31, 10**20, -(10**20), 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "x", "x" * 2000, "1", "nan", "-1", "\ud800", "a\0b", "\n", "../..", "/dev/zero", "{0..999999999999}",
    "<image>", "<|im_end|>", "{answer:>999999999}", "(a+)+$", "{{ 1 }}", "$NAME", "~", "é", "http://x/y",
    [], [None], [[]], ["x", "x"], {}, {"x": 1}, {"": None}, [{}], [[[[[[[[]]]]]]]],
)  # fmt: skip


class TooSlow(Exception):
    """A run took longer than SECONDS."""


@contextmanager
def within(seconds: int = SECONDS) -> Iterator[None]:
    """Raise TooSlow where the block takes longer."""

    def ring(*_: Any) -> None:
        raise TooSlow(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(run: Callable[[], T]) -> T | None:
    """What `run` gives, or None where it ends in one line of ours. Everything else is raised, and so fails the test."""
    try:
        with within():
            return run()
    except UnclippedError as error:
        line = str(error)
    assert line.strip()
    assert "\n" not in line, line
    line.encode()
    assert len(line) < 5000, line[:300]
    return None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a structure."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """`value` with one to `most` of its inner values replaced, removed, moved under another name, or repeated."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(value)))
        new = draw(st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8))
        if not path:
            if draw(st.integers(0, 19)) == 0:
                value = copy.deepcopy(new)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "repeat"]))
        if kind == "replace":
            holder[path[-1]] = copy.deepcopy(new)
        elif kind == "remove":
            del holder[path[-1]]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from([str(path[-1]) + "s", "x", str(path[-1])[:-1]]))] = holder.pop(path[-1])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with bytes changed, cut out, repeated, or cut off."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        kind = draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "repeat", "end"]))
        if kind == "flip" and raw:
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and raw:
            raw[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at : at + draw(st.integers(1, 16))]
        elif kind == "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"[", b"{", b'"', b"\xff", b"\0"]))
        elif kind == "repeat":
            raw[at:at] = raw[at : at + draw(st.integers(1, 64))]
        else:
            del raw[at:]
    return bytes(raw)


@st.composite
def tar_member(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """A member whose header may be odd in any field, with pax headers of drawn names and values."""
    info = tarfile.TarInfo(draw(st.just(name) | st.text(max_size=12).filter(lambda text: "\ud800" not in text)))
    info.size = len(content)
    info.type = draw(st.sampled_from([tarfile.REGTYPE] * 4 + [bytes([code]) for code in b"\x0012345678gxLKSVDMNA"]))
    info.mode = draw(st.integers(0, 0o7777777))
    keys = st.sampled_from(
        ["size", "path", "linkpath", "mtime", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major",
         "GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.name", "GNU.sparse.numblocks", "hdrcharset", "x"]
    )  # fmt: skip
    values = st.sampled_from(["", "0", "1", "-1", "9" * 30, "0,1,2", "a", "1e9", "nan", "BINARY"]) | st.text(max_size=6)
    info.pax_headers = draw(st.dictionaries(keys, values.filter(_is_text), max_size=3))
    kind = tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT
    block = info.tobuf(kind, "utf-8", "replace")
    if draw(st.integers(0, 3)) == 0:
        info.pax_headers = {}
        number = draw(st.sampled_from([-1, -512, 1 << 40, (1 << 63) - 1, 1 << 70]))
        size = (number % (1 << 88)).to_bytes(11, "big")
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "replace"))
        block[124:136] = (b"\xff" if number < 0 else b"\x80") + size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block) + content + bytes(-len(content) % 512)


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)
