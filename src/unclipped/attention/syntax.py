"""The text form of patterns: `global_text + sink(1) + topk(k=32)`; `+` is union, `&` intersection and binds tighter.

Lists for heads and layers part their entries by `|`; `3*` before an entry repeats it: `per_layer(2*full | topk(8))`.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any

from unclipped.attention import scoring
from unclipped.attention.parts import Listed
from unclipped.attention.patterns import PATTERNS, Pattern
from unclipped.core.errors import UsageError, nearest

_TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*)|(-?\d+\.?\d*(?:[eE][+-]?\d+)?|-?\.\d+)|([+&(),=|*]))")
_MOST_REPEATS = 1024
MAX_CHARACTERS = 10_000
"""Length of a pattern's text."""
MAX_DEPTH = 20
"""Parentheses inside each other."""
MAX_PATTERNS = 100_000
"""Patterns that a text names, its repeated entries counted each time."""
_MAX_SHOWN = 80


class _Reader:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise UsageError(f"pattern '{text:.40}…': {len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
        self.shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
        self.position, self.depth, self.tokens = 0, 0, self._tokens(text)

    @staticmethod
    def _tokens(text: str) -> list[str]:
        tokens, place = [], 0
        text = text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise UsageError(f"pattern '{text:.80}': cannot read '{text[place:].strip()[:20]}'")
            tokens.append(match[0].strip())
            place = match.end()
        return tokens

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            wanted, found = f"'{expected}'" if expected else "a pattern", f"'{token}'" if token else "its end"
            raise UsageError(f"pattern '{self.shown}': expected {wanted}, found {found}")
        self.position += 1
        return token

    def union(self) -> Pattern:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UsageError(f"pattern '{self.shown}': parentheses lie more than {MAX_DEPTH} levels deep; flatten it")
        pattern = self.intersection()
        while self.peek() == "+":
            self.take()
            pattern = pattern + self.intersection()
        self.depth -= 1
        return pattern

    def intersection(self) -> Pattern:
        pattern = self.single()
        while self.peek() == "&":
            self.take()
            pattern = pattern & self.single()
        return pattern

    def single(self) -> Pattern:
        if self.peek() == "(":
            self.take()
            pattern = self.union()
            self.take(")")
            return pattern
        name = self.take()
        if name not in PATTERNS:
            raise UsageError(f"pattern '{self.shown}': unknown pattern '{name}'; {nearest(name, PATTERNS)}")
        kind = PATTERNS[name]
        return self.listed(kind) if issubclass(kind, Listed) else self.build(kind)

    def listed(self, kind: type[Listed]) -> Pattern:
        self.take("(")
        parts: list[Pattern] = []
        named = 0
        while True:
            repeats = self.repeats(kind)
            entry = self.union()
            named += repeats * sum(1 for _ in entry.walk())
            if named > MAX_PATTERNS:
                raise UsageError(f"pattern '{self.shown}': names more than {MAX_PATTERNS:,} patterns; repeat fewer")
            parts += [entry] * repeats
            if self.peek() != "|":
                break
            self.take()
        self.take(")")
        return kind(tuple(parts))

    def repeats(self, kind: type[Listed]) -> int:
        """The number before `*`, if an entry begins with one."""
        if self.position + 1 >= len(self.tokens) or self.tokens[self.position + 1] != "*":
            return 1
        count = self.take()
        self.take("*")
        if not count.isdecimal() or not 1 <= int(count) <= _MOST_REPEATS:
            raise UsageError(
                f"pattern {kind.name}: expected a whole number from 1 to {_MOST_REPEATS} before '*', found '{count}'"
            )
        return int(count)

    def build(self, kind: type[Pattern]) -> Pattern:
        places = [item.name for item in fields(kind)]
        values: dict[str, Any] = {}
        if self.peek() == "(":
            self.take()
            while self.peek() != ")":
                first = self.take()
                if self.peek() == "=":
                    self.take()
                    name, value = first, self.take()
                elif len(values) < len(places):
                    name, value = places[len(values)], first
                else:
                    raise UsageError(f"pattern {kind.name}: takes {len(places)} values ({', '.join(places) or 'none'})")
                if name not in places:
                    raise UsageError(f"pattern {kind.name}: unknown value '{name}'; {nearest(name, places)}")
                if name in values:
                    raise UsageError(f"pattern {kind.name}: '{name}' is given twice")
                values[name] = self.value(kind, name, value)
                if self.peek() != ")":
                    self.take(",")
            self.take(")")
        lacking = [item.name for item in fields(kind) if item.default is MISSING and item.name not in values]
        if lacking:
            raise UsageError(f"pattern {kind.name}: {', '.join(lacking)} must be given, as in {example(kind)}")
        return kind(**values)

    @staticmethod
    def value(kind: type[Pattern], name: str, text: str) -> int | float | str:
        wanted = next(item.type for item in fields(kind) if item.name == name)
        try:
            return {"int": int, "float": float}.get(str(wanted), str)(text)
        except ValueError:  # also a number of thousands of digits
            raise UsageError(f"pattern {kind.name}: {name} must be a whole number, found '{text:.40}'") from None


def example(kind: type[Pattern]) -> str:
    """A pattern of this kind as it is written."""
    if issubclass(kind, Listed):
        return f"{kind.name}(full | window(size=4))"
    return f"{kind.name}({', '.join(f'{item.name}=4' for item in fields(kind) if item.default is MISSING)})"


def parse_pattern(text: str) -> Pattern:
    """Read a pattern; `str` of the result reads back to an equal one. Raises UsageError with the nearest valid name."""
    reader = _Reader(text)
    pattern = reader.union()
    if reader.peek():
        raise UsageError(f"pattern '{reader.shown}': expected '+', '&' or its end, found '{reader.peek()}'")
    return pattern


def pattern_names() -> list[str]:
    """All names the syntax knows, sorted."""
    assert scoring  # registers the dynamic patterns
    return sorted(PATTERNS)
