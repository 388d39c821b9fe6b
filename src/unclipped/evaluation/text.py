"""Text rules shared by the scorers: normalisation, numbers, edit distance, and the normaliser of soft VQA accuracy."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Hashable, Sequence

from rapidfuzz.distance import Levenshtein

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_GROUPED_NUMBER = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?(?![0-9])|" + _NUMBER.pattern)


def normalise(text: str, *, case_sensitive: bool = False) -> str:
    """Unicode NFC, ends stripped, inner white space collapsed to one blank; case-folded unless `case_sensitive`."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text if case_sensitive else text.casefold()


_THINKING = re.compile(r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(r".*</(?:think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE)


def without_thinking(text: str) -> str:
    """Without blocks such as `<think>…</think>`. One that does not end takes the rest, and what ends without having
    begun takes all before it: templates may open it in the prompt."""
    return _THINKING_END.sub("", _THINKING.sub("", text))


def has_thinking(text: str) -> bool:
    """Whether `without_thinking` leaves anything out."""
    return _THINKING.search(text) is not None or _THINKING_END.search(text) is not None


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each of cost 1, between two sequences."""
    return Levenshtein.distance(first, second)


def parse_number(text: str) -> float | None:
    """The whole text as a number; `15%` is 0.15. Grouped digits (`1,000`) are no number: the ChartQA rule.

    Words that Python's `float` accepts (`nan`, `infinity`, `1_000`, non-ASCII digits) are no numbers here.
    """
    text = text.strip()
    body = text.rstrip("%")
    if not _NUMBER.fullmatch(body):
        return None
    value = float(body) / 100.0 if text.endswith("%") else float(body)
    return value if math.isfinite(value) else None  # 1e400


def find_number(text: str) -> float | None:
    """The only number in a text, digits grouped by commas allowed; None when there is none or more than one value."""
    values = {float(match.group().replace(",", "")) for match in _GROUPED_NUMBER.finditer(text)}
    return values.pop() if len(values) == 1 and all(map(math.isfinite, values)) else None


# Soft VQA accuracy compares answers after this normaliser. Contractions typed without an apostrophe get it back,
# except where that would turn one English word into another (its, were, well, hell, shell, wed, id, ill, shed, lets).
_CONTRACTIONS = """
ain't aren't can't couldn't could've didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's i'm i've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't
she's shouldn't should've somebody's someone's something's that'd that's there'd there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't wouldn't would've y'all you'd you'll you're you've
"""
_RESTORED = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_FULL_STOP = re.compile(r"\.(?![0-9])")


def normalise_vqa(text: str) -> str:
    """The answer normaliser of soft VQA accuracy: punctuation, lower case, number words, articles, contractions.

    A punctuation mark beside a blank or at an end disappears, and every mark does when a comma groups digits somewhere
    in the text; another one becomes a blank (`red/white` -> `red white`). A full stop stays only before a digit.
    """
    text = " ".join(text.split())
    spaced = f" {text} "
    grouped = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        touches_blank = f"{mark} " in spaced or f" {mark}" in spaced
        text = text.replace(mark, "" if touches_blank or grouped else " ")
    words = [_DIGITS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
