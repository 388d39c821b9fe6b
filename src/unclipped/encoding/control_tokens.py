"""Control tokens and typed text: tokenising in which only the text of a template itself becomes a control token.

Who types `<|im_end|>` or `<image>` in a question, an answer or a document gets these characters, never the token that
ends a turn or is the place of an image. Text without such words is encoded exactly as by the tokenizer itself.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from unclipped.core.errors import DataError

_KEPT = 1 << 14

Piece = tuple[str, bool]
"""A text, and whether it is the template's own, in which control tokens are meant."""


class TextTokens:
    """A tokenizer that keeps the control tokens of typed text from meaning anything. What recurs is kept."""

    def __init__(self, tokenizer: Any, image_token_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        named = {getattr(tokenizer, f"{role}_token_id", None) for role in ("eos", "bos", "pad")} | {image_token_id}
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {index for index in (*tokenizer.all_special_ids, *named) if index is not None}
        self.special: frozenset[int] = frozenset(special)
        """Ids of all special tokens."""
        self._unknown = getattr(tokenizer, "unk_token_id", None)
        if self._unknown in named:
            self._unknown = None
        # An unknown character gives a special token too, and is no control token.
        self._control: frozenset[int] = frozenset(index for index in self.special if index != self._unknown)
        self.encode = lru_cache(maxsize=_KEPT)(self._encode)
        self._own_tokens = lru_cache(maxsize=_KEPT)(lambda text: self._controls(self._parsed(text)))

    def document(self, text: str) -> list[int]:
        """Ids of typed text with what the tokenizer puts around every text. Raises DataError as `encode` does."""
        ids = self.tokenizer(text)["input_ids"]
        expected = self._controls(self.tokenizer("")["input_ids"])
        if self._controls(ids) != expected:
            ids = self._as_characters(((text, False),), expected, around=True)
        return list(ids)

    def _encode(self, pieces: tuple[Piece, ...]) -> tuple[int, ...]:
        """Ids of the pieces joined.

        Raises DataError where the tokenizer cannot write a control token of typed text as characters.
        """
        return self._checked(pieces, self._parsed("".join(text for text, _ in pieces)))

    def encode_all(self, documents: Sequence[tuple[Piece, ...]]) -> list[tuple[int, ...]]:
        """`encode` of many at once, which the tokenizer spreads over threads; nothing is kept."""
        texts = ["".join(text for text, _ in pieces) for pieces in documents]
        split = {"split_special_tokens": False} if getattr(self.tokenizer, "split_special_tokens", False) else {}
        rows = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, **split)["input_ids"]
        return [self._checked(pieces, tuple(ids)) for pieces, ids in zip(documents, rows, strict=True)]

    def _checked(self, pieces: tuple[Piece, ...], ids: tuple[int, ...]) -> tuple[int, ...]:
        """`ids` where all their control tokens are the template's own, else the ids with the typed ones written out."""
        expected = tuple(token for text, own in pieces if own for token in self._own_tokens(text))
        return ids if self._controls(ids) == expected else self._as_characters(pieces, expected)

    def _controls(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(token for token in ids if token in self._control)

    def _parsed(self, text: str) -> tuple[int, ...]:
        """Ids as the tokenizer gives them, control tokens parsed."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # The fast path skips the wrapper; what an earlier call left on in the backend would show in it.
        if backend is not None and not (backend.padding or backend.truncation or backend.encode_special_tokens):
            return tuple(backend.encode(text, add_special_tokens=False).ids)
        # A tokenizer saved with split_special_tokens would take a template's own tokens for characters.
        split = {"split_special_tokens": False} if getattr(self.tokenizer, "split_special_tokens", False) else {}
        ids = self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False, **split)["input_ids"]
        return tuple(ids)

    def _as_characters(
        self, pieces: tuple[Piece, ...], expected: Sequence[int], *, around: bool = False
    ) -> tuple[int, ...]:
        ids = self._by_substitutes(pieces, around) if self._substitutes else self._by_stretches(pieces, around)
        if self._controls(ids) != tuple(expected):
            typed = next((word for word in self._words if any(word in text for text, own in pieces if not own)), None)
            raise DataError(
                f"the text holds {f'the control token {typed!r}' if typed else 'a control token'}, and this tokenizer "
                "cannot write it as characters; remove it from the text"
            )
        return ids

    def _by_substitutes(self, pieces: tuple[Piece, ...], around: bool) -> tuple[int, ...]:
        """All in one pass, so that white space and prefixes come out as in any other text.

        The backend takes all control tokens for characters; those of the template are replaced by substitutes, which
        nobody can type, and put back in the ids.
        """
        assert self._substitutes is not None
        backend, words, ids = self._substitutes
        text = "".join(self._word.sub(lambda found: words[found[0]], text) if own else text for text, own in pieces)
        found: list[int] = backend.encode(text, add_special_tokens=around).ids
        return tuple(ids.get(token, token) for token in found)

    def _by_stretches(self, pieces: tuple[Piece, ...], around: bool) -> tuple[int, ...]:
        """For tokenizers without a backend: each stretch between two control tokens of the template by itself."""
        ids: list[int] = []
        stretch = ""

        def flush() -> None:
            nonlocal stretch
            if stretch:
                ids.extend(self.tokenizer(stretch, add_special_tokens=around, split_special_tokens=True)["input_ids"])
            stretch = ""

        for text, own in pieces:
            for number, part in enumerate(self._word.split(text) if own else [text]):
                if number % 2:  # a word itself, since the expression has one group
                    flush()
                    ids.append(self._words[part])
                else:
                    stretch += part
        flush()
        return tuple(ids)

    @cached_property
    def _words(self) -> dict[str, int]:
        """Control tokens as text -> id, the longest first."""
        tokens = {str(self.tokenizer.convert_ids_to_tokens(index)): index for index in self._control}
        return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))

    @cached_property
    def _word(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self._words))})")

    @cached_property
    def _substitutes(self) -> tuple[Any, dict[str, str], dict[int, int]] | None:
        """(backend, word -> substitute, id of the substitute -> id of the word); None without a backend."""
        live = getattr(self.tokenizer, "backend_tokenizer", None)
        if live is None:
            return None
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(live.to_str())  # a copy: the flag below must not reach other users
        backend.no_padding()
        backend.no_truncation()
        added = self.tokenizer.added_tokens_decoder
        backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in self._words])
        backend.encode_special_tokens = True
        words = {word: f"\ue0ff{secrets.token_hex(8)}\ue0ff" for word in self._words}
        for word, substitute in words.items():
            token = added.get(self._words[word])
            sides = {side: bool(getattr(token, side, False)) for side in ("lstrip", "rstrip", "single_word")}
            backend.add_tokens([AddedToken(substitute, normalized=False, special=False, **sides)])
        ids = {int(backend.token_to_id(substitute) or 0): self._words[word] for word, substitute in words.items()}
        return backend, words, ids
