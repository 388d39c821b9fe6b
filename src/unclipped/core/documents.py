"""JSON, JSON Lines and YAML of unknown origin, read within limits: size, depth, digits, aliases, duplicate keys.

Every loader of a structured file reads through this module, so a damaged or hostile file ends in one line that names
the file, never in a traceback, a hang or gigabytes.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from unclipped.core.errors import DataError, UnclippedError

MAX_DEPTH = 100
"""Levels of lists and mappings inside each other."""
MAX_DIGITS = 400
"""Digits of one whole number; the largest float has 309."""
MAX_JSON_BYTES = 4 << 30
"""Size of a JSON file, which is read whole; data sets of one array reach a gigabyte."""
MAX_LINE_BYTES = 64 << 20
"""Size of one line of a JSON Lines file."""
MAX_YAML_BYTES = 4 << 20
MAX_YAML_NODES = 100_000
"""Values of a YAML document after each alias is replaced by what it names."""

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {dict: "a JSON object", list: "a JSON array"}


def regular_file(path: str | Path, error: type[UnclippedError] = DataError, *, limit: int | None = None) -> int:
    """Size in bytes of a regular file. Raises `error` for anything else (device, pipe, folder) and above `limit`."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise error(f"{path}: no such file; correct the path") from None
    except (OSError, ValueError) as cause:  # ValueError: a null character, or a surrogate, in the path
        raise error(f"{shown(path)}: cannot be read ({getattr(cause, 'strerror', None) or cause})") from None
    if stat.S_ISDIR(found.st_mode):
        raise error(f"{path}: is a folder; give a file")
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is no regular file (a device or a pipe, which may never end); give a file on disk")
    if limit is not None and found.st_size > limit:
        raise error(f"{path}: {found.st_size:,} bytes; the limit is {limit:,}; split the file")
    return found.st_size


def shown(value: Any) -> str:
    """`value` as text that every terminal can print: characters that are no Unicode text are written as escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def read_bytes(path: str | Path, error: type[UnclippedError] = DataError, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `error` when it cannot be read."""
    regular_file(path, error, limit=limit)
    try:
        with open(path, "rb") as stream:
            content = stream.read(limit + 1)
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause})") from None
    if len(content) > limit:
        raise error(f"{path}: more than {limit:,} bytes; split the file")
    return content


def decoded(content: bytes, where: str, error: type[UnclippedError] = DataError) -> str:
    """UTF-8 text without a byte order mark. Raises `error` naming `where` when the bytes are no UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not UTF-8 text (byte {cause.start}); save the file as UTF-8") from None


def parse_json(
    content: str | bytes,
    where: str,
    *,
    root: type | None = None,
    error: type[UnclippedError] = DataError,
    remedy: str = "the file may be cut: repair or replace it",
    checked: bool = True,
) -> Any:
    """The value of a JSON text, within the limits of this module.

    where: file and line, for messages. root: dict or list, when nothing else will do. checked: False where the caller
    calls `check_value` on each part, so that an error names the part. NaN and the infinities, which Python's writer
    emits, come back as floats. Raises `error` with one line.
    """
    text = decoded(content, where, error) if isinstance(content, bytes) else content.removeprefix("\ufeff")
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_int=_whole_number)
    except json.JSONDecodeError as cause:
        place = f"{where}, line {cause.lineno}" if cause.lineno > 1 else where
        raise error(f"{place}: not valid JSON ({cause.msg} at column {cause.colno}); {remedy}") from None
    except RecursionError:
        raise error(f"{where}: lists and objects lie more than {MAX_DEPTH} levels deep; flatten them") from None
    except _Refused as cause:
        raise error(f"{where}: {cause}") from None
    if checked and (
        text.count("[") + text.count("{") > MAX_DEPTH or _SURROGATE_ESCAPE.search(text) or _SURROGATE.search(text)
    ):
        check_value(value, where, error)
    if root is not None and not isinstance(value, root):
        raise error(f"{where}: expected {_KINDS.get(root, root.__name__)}, found {kind_of(value)}; {remedy}")
    return value


def read_json(
    path: str | Path,
    *,
    root: type | None = dict,
    error: type[UnclippedError] = DataError,
    remedy: str = "the file may be cut: repair or replace it",
    limit: int = MAX_JSON_BYTES,
    checked: bool = True,
) -> Any:
    """The value of a JSON file; see `parse_json`. Raises `error` naming the file, with one line."""
    content = read_bytes(path, error, limit=limit)
    return parse_json(content, str(path), root=root, error=error, remedy=remedy, checked=checked)


def read_text(path: str | Path, error: type[UnclippedError] = DataError, *, limit: int = MAX_JSON_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises `error` naming the file, with one line."""
    return decoded(read_bytes(path, error, limit=limit), str(path), error)


def read_jsonl(
    path: str | Path,
    *,
    error: type[UnclippedError] = DataError,
    remedy: str = "the file may be cut: remove or repair that line",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON Lines file. Raises `error` naming file and line."""
    regular_file(path, error)
    try:
        with open(path, "rb") as stream:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise error(f"{where}: longer than {MAX_LINE_BYTES:,} bytes; put one JSON object on each line")
                if line.strip():
                    yield number, parse_json(line.rstrip(), where, root=dict, error=error, remedy=remedy)
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause})") from None


def parse_yaml(text: str, where: str, *, error: type[UnclippedError] = DataError) -> Any:
    """The value of a YAML text, within the limits of this module. Raises `error` with one line.

    Aliases may be used, but not to build more than MAX_YAML_NODES values or a value that contains itself.
    """
    if len(text) > MAX_YAML_BYTES:
        raise error(f"{where}: {len(text):,} characters; the limit is {MAX_YAML_BYTES:,}")
    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except _Refused as cause:
        raise error(f"{where}: {cause}") from None
    except RecursionError:
        raise error(f"{where}: values lie more than {MAX_DEPTH} levels deep; flatten them") from None
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(cause, "problem", None) or next(iter(str(cause).splitlines()), "unreadable")
        raise error(f"{where}{line}: not valid YAML ({shown(problem)})") from None
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError) as cause:
        # PyYAML's constructors let these through: a date that is none, a number with too many digits, `!!float x`
        raise error(f"{where}: not valid YAML ({shown(cause) or type(cause).__name__})") from None
    check_value(value, where, error)
    return value


def read_yaml(path: str | Path, *, error: type[UnclippedError] = DataError) -> Any:
    """The value of a YAML file, within the limits of this module. Raises `error` naming the file, with one line."""
    return parse_yaml(decoded(read_bytes(path, error, limit=MAX_YAML_BYTES), str(path), error), str(path), error=error)


def check_value(value: Any, where: str, error: type[UnclippedError] = DataError) -> None:
    """Raise `error` where a value of lists and mappings is too deep or holds text that is no Unicode text."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                check_text(item, where, error)
            elif isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list | tuple | set):
                below.extend(item)
        if not below:
            return
        level = below
    raise error(f"{where}: lists and objects lie more than {MAX_DEPTH} levels deep; flatten them")


def check_text(text: str, where: str, error: type[UnclippedError] = DataError) -> str:
    """`text` itself. Raises `error` when it holds half of a surrogate pair, which no tokenizer or file can take."""
    if found := _SURROGATE.search(text):
        raise error(
            f"{where}: the text holds half of a surrogate pair ({shown(found.group())}), which is no character: "
            "a cut emoji, or bytes that are not UTF-8; remove it"
        )
    return text


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    return {type(None): "null", dict: "an object", list: "an array", str: "text", bool: "a boolean"}.get(
        type(value), f"the number {value}" if isinstance(value, int | float) else type(value).__name__
    )


class _Refused(Exception):
    """A limit of this module was met while another library parses."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key '{shown(double)[:80]}' occurs twice in one object; keep one")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"a number of {len(digits):,} digits; the limit is {MAX_DIGITS}")
    return int(digits)


def _check_events(events: Iterable[yaml.Event]) -> None:
    """Refuse a document by its events, which the parser gives one by one without recursion."""
    sizes: dict[str, int] = {}  # values below each anchor that is complete
    open_values: list[tuple[str | None, int]] = []  # (anchor, values counted before it)
    total = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_values):
                raise _Refused(f"the alias *{event.anchor} stands for a value that contains it; write the value out")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_values.append((event.anchor, total))
            total += 1
            if len(open_values) > MAX_DEPTH:
                raise _Refused(f"values lie more than {MAX_DEPTH} levels deep; flatten them")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_values.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > MAX_YAML_NODES:
            raise _Refused(f"more than {MAX_YAML_NODES:,} values, aliases written out; shorten it")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice and numbers of thousands of digits."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (key.tag, key.value) in seen:
                    raise _Refused(f"line {key.start_mark.line + 1}: the key '{key.value[:80]}' occurs twice; keep one")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > MAX_DIGITS:
            raise _Refused(f"a number of {len(node.value):,} digits; the limit is {MAX_DIGITS}")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
