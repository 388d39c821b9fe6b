"""Multiple-choice answers: the one choice that a text names, by letter or by its own text, or none; never a guess.

What counts, first to last: the whole text is a choice; an answer is stated (`the answer is B`, `B is correct`, a last
line that is a letter); a letter or a choice opens the text (`B`, `**B**`, `B. cat`); the last line ends in a letter;
one option is mentioned (`option B`, `(B)`); one choice stands in the text. What is denied (`not A`, `A is wrong`) does
not count. Reasons behind an opening letter may name any choice. Answers that contradict each other are none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from unclipped.evaluation.text import normalise

_LETTER = r"(?<![\w'’])[(\[{]?([A-Z])[)\]}]?(?![\w'’])"
_DENIED_BEFORE = (
    r"(?:\b(?i:not|nor|neither|never|except|excluding|unlike|without|rather than|instead of|rules? out|excludes?|"
    r"eliminates?)|n['’]t(?: be)?)\s+(?:(?i:be|a|an|the|answer|option|choice)\s+)*"
)
_DENIED = re.compile(rf"{_DENIED_BEFORE}{_LETTER}")
_DENIED_BEHIND = re.compile(
    rf"(?:\b(?i:option|choice|answer)\s+)?{_LETTER}\s+(?:cannot|(?:is|are|was|can|could|does|would|must|should)"
    r"(?:n['’]t|\s+(?:not|wrong|incorrect|false|impossible|unlikely|ruled|excluded|eliminated)))\b"
    r"(?:\s+be\b)?(?:\s+(?:right|correct|true|the answer)\b)?"
)
_DENIED_NAME = re.compile(rf"{_DENIED_BEFORE}$")
_CUE = re.compile(
    r"\b(?i:(?P<final>final\s+)?(?:answer|option|choice|response))[\"']?\s*"
    r"(?:(?i:is|would be|should be|must be|will be|has to be)\b\s*:?|[:=>–—-]+)\s*"
    r"(?:(?i:option|choice|letter|answer|clearly|definitely|probably|most|likely)\b\s*:?\s*)*[\"'`]*"
)
# A and I open phrases, and so may any small letter: they need a mark, the end, or a reason behind them.
_LETTER_HERE = re.compile(
    r"[(\[{]([A-Za-z])[)\]}]|([B-HJ-Z])(?![\w'’])|([A-Za-z])(?=\s*(?:[.):,;!?<\"'\]}]|\n|$|(?i:because|since|as|due)\b))"
)
_CORRECT = re.compile(
    rf"{_LETTER}\s+(?:is|must be|seems|looks)\s+(?:clearly\s+|definitely\s+)?(?:the\s+answer|(?:the\s+)?"
    r"(?:correct|right|best)(?:\s+(?:answer|option|choice|one))?(?=\s*(?:[.,;!)]|$|\n|because\b|since\b|as\b)))"
)
_CHOSEN = re.compile(
    rf"\b(?i:choose|pick|select|go with|going with|opt for|vote for)\s+(?i:option\s+|choice\s+)?{_LETTER}"
)
_LAST_LETTER = re.compile(
    r"(?:[,:;–—]|\b(?i:so|thus|hence|therefore|but|is|it's|be|say|think)\b[,:]?)\s*"
    rf"(?:(?i:it is|it's|option|choice)\s+)*{_LETTER}[\s.!]*$"
)
_OPTION = re.compile(rf"\b(?i:option|choice|answer)\s+{_LETTER}|[(\[]([A-Z])[)\]]")
_BARE = re.compile(r"[\s\"'`(\[{<]*(?:(?i:option|choice)\s+)?([A-Za-z])[\s\"'`)\]}>.,:;!]*")
_LABEL = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Za-z])\))\s*|(?:([A-Z])\s*[.:,;]|([a-z])\.|([A-Z])\s+[–—-])(?:\s+|$)"
)
_DENIED_LABEL = re.compile(r"(?i:no|not|false|wrong|incorrect)\s*(?:[.,;:!]|$)")
_SEVERAL = re.compile(
    r"[(\[]?[A-Z][)\]]?(?:\s*(?:,\s*and\b|,\s*or\b|,|/|&|\band\b|\bor\b)\s*"
    r"[(\[]?(?:[B-HJ-Z](?![\w'’])|[AI](?=\s*(?:$|[.,;!)\]\n])))[)\]]?)+"
)
_YES_OR_NO = {"yes", "no", "true", "false"}


_BULLET = re.compile(r"^(?:[#>•\s]|-(?![\d.]))+")  # not the sign of a number


class _Unclear(Exception):
    """The text names several choices, or contradicts itself."""


def read_choice(text: str, names: list[str]) -> str | None:
    """Which of the choices the text names. names: the choices, normalised; A is the first. -> one of them, or None."""
    if (whole := _without_marks(normalise(text))) in names:
        return whole
    try:
        return _Reading(text, names).choice()
    except _Unclear:
        return None


def _without_marks(text: str) -> str:
    return text.strip(" \"'`").rstrip(".!").strip(" \"'`")


def _plain(text: str) -> str:
    """Without full-width forms and markup, and without letters that are denied; lines are kept."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\boxed\s*\{(?:\\(?:text|mathrm|mathbf)\s*\{)?([^{}\n]*)\}+", r" final answer: \1 ", text)
    text = re.sub(r"\*+|__|`|\$(?=[A-Za-z]\$)|(?<=\$[A-Za-z])\$", "", text)
    lines = (" ".join(_BULLET.sub("", line).split()) for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    return _DENIED_BEHIND.sub(" ", _DENIED.sub(" ", text)).strip()


class _Reading:
    """One text read for choices."""

    def __init__(self, text: str, names: list[str]) -> None:
        self.text, self.names = _plain(text), names
        self.lines = self.text.split("\n")
        self.by_letter = {chr(ord("a") + index): name for index, name in enumerate(names[:26])}
        longest_first = sorted(set(names) - {""}, key=len, reverse=True)
        any_of = "|".join(map(re.escape, longest_first)) or "(?!)"
        # A part of a number is no choice: 2 is not in 2.5, -2 or 2,000.
        self.any_name = re.compile(rf"(?<!\w)(?<!\d[.,])(?<!\s[-−])(?<!^[-−])(?:{any_of})(?!\w)(?!(?<=\d)[.,]\d)")

    def choice(self) -> str | None:
        """The choice, or None. Raises _Unclear."""
        stated, opening = self._stated(), self._bare(self.lines[0])
        if stated is not None:
            if opening is not None and opening != stated:
                raise _Unclear
            return stated
        if opening is not None:  # what follows gives reasons, and may name the others
            return opening
        for look in (self._opening, self._closing, self._mentioned):
            if (found := look()) is not None:
                return found
        return _only({name for name, _ in self._named(self.text)})

    def _stated(self) -> str | None:
        """What the text says to be the answer; what it calls final overrules the rest."""
        final: set[str] = set()
        others: set[str] = set()
        for cue in _CUE.finditer(self.text):
            name = self._at(self.text[cue.end() :])
            if name is not None:
                (final if cue["final"] else others).add(name)
        for pattern in (_CORRECT, _CHOSEN):
            for match in pattern.finditer(self.text):
                if re.search(r"(?:\b(?:and|or|nor)|[/&])\s*$", self.text[: match.start()]):
                    raise _Unclear  # A or B is right
                others |= self._of_letters(match)
        if len(self.lines) > 1 and (last := self._bare(self.lines[-1])) is not None:
            others.add(last)
        return _only(final) if final else _only(others)

    def _at(self, text: str) -> str | None:
        """The choice that a text begins with, by its letter or its own text."""
        if _SEVERAL.match(text):
            raise _Unclear
        match = _LETTER_HERE.match(text)
        name = self.by_letter.get(next(filter(None, match.groups())).lower()) if match else None
        if match is not None and name is not None:
            self._refuse_other(name, text[match.end() :])
            return name
        return self._begins(text)

    def _begins(self, text: str) -> str | None:
        """The choice whose text stands at the beginning, behind an article or not."""
        line = normalise(text.split("\n", 1)[0])
        match = self.any_name.match(line) or self.any_name.match(re.sub(r"^(?:an?|the)\s+", "", line))
        return match.group() if match else None

    def _refuse_other(self, name: str, behind: str) -> None:
        """A letter with the text of another choice directly behind it is a contradiction: `B. dog`."""
        line = re.sub(r"^[\s.):,;\]}–—-]+", "", behind.split("\n", 1)[0])
        other = self._begins(line)
        if other is not None and other != name and name not in {own for own, _ in self._named(line)}:
            raise _Unclear

    def _bare(self, line: str) -> str | None:
        """The choice of a line that holds nothing else: its letter or its text."""
        match = _BARE.fullmatch(line)
        if match is not None:
            return self.by_letter.get(match[1].lower())
        text = _without_marks(normalise(line))
        return text if text in self.names else None

    def _opening(self) -> str | None:
        """The choice of a label that opens the text, unless the text lists the choices from A on."""
        line = self.lines[0]
        if _SEVERAL.fullmatch(line.rstrip(".!")):
            raise _Unclear
        match = _LABEL.match(line)
        if match is not None:
            letter = next(filter(None, match.groups())).lower()
            labels = [next(filter(None, m.groups())).lower() for m in map(_LABEL.match, self.lines) if m]
            if letter in self.by_letter and labels[:2] != ["a", "b"]:
                rest = line[match.end() :]
                if _DENIED_LABEL.match(rest) and self._begins(rest) is None:
                    return None
                if re.match(r"(?:and\s|or\s)?[(\[]?[A-Z][)\]]?(?:[\s.,;:]*$|\s*(?:,|and\b|or\b|[.):]\s))", rest):
                    raise _Unclear  # A, B
                self._refuse_other(self.by_letter[letter], rest)
                return self.by_letter[letter]
        first = normalise(re.split(r"[,.;:!\n]", self.text, maxsplit=1)[0])
        return first if first in _YES_OR_NO and first in self.names else None

    def _closing(self) -> str | None:
        """The letter that the last line ends in, behind a mark or a word that leads to it."""
        match = _LAST_LETTER.search(self.lines[-1])
        return _only(self._of_letters(match)) if match else None

    def _mentioned(self) -> str | None:
        """The only letter that stands in brackets or behind the word option."""
        return _only({name for match in _OPTION.finditer(self.text) for name in self._of_letters(match)})

    def _of_letters(self, match: re.Match[str]) -> set[str]:
        letters = (letter.lower() for letter in match.groups() if letter)
        return {self.by_letter[letter] for letter in letters if letter in self.by_letter}

    def _named(self, text: str) -> Iterator[tuple[str, int]]:
        """Choices whose text stands in `text` as whole words and is not denied, with their places. Inside a longer
        choice ("dark red") a shorter one ("red") does not count."""
        whole = normalise(text)
        for match in self.any_name.finditer(whole):
            if not _DENIED_NAME.search(whole[: match.start()]):
                yield match.group(), match.start()


def _only(names: set[str]) -> str | None:
    if len(names) > 1:
        raise _Unclear
    return next(iter(names), None)
