"""Scoring rules. Each turns one prediction into a numerator and a denominator; a figure is the ratio of their sums.

Means have denominator 1, so their figure is the mean of the items. The character error rate has the gold length as its
denominator, so its figure is all edits over all characters (a micro average), and the same intervals serve both.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from unclipped.core.config import FrozenConfig, Number, Share, complaint
from unclipped.core.errors import DataError, UsageError, nearest
from unclipped.core.registry import Registry
from unclipped.evaluation.choices import read_choice
from unclipped.evaluation.figures import ACCURACY, ANLS, CHARACTER_ERROR_RATE, Metric
from unclipped.evaluation.text import (
    edit_distance,
    find_number,
    has_thinking,
    normalise,
    normalise_vqa,
    parse_number,
    without_thinking,
)


@dataclass(frozen=True)
class Score:
    """Score of one item: `numerator / denominator`. `is_parsed` is false when no answer could be read from the text;
    `has_thinking` says that thinking was taken out of it first."""

    numerator: float
    denominator: float = 1.0
    is_parsed: bool = True
    has_thinking: bool = False

    @property
    def value(self) -> float:
        """The item's own figure: accuracy, similarity, or error rate."""
        return self.numerator / self.denominator


class Scorer(FrozenConfig, ABC):
    """A scoring rule; its fields are its options. Pure: the same texts give the same score.

    What a model thinks before it answers (`<think>…</think>`) is never scored. A text of thinking alone, such as one
    that was cut off in it, is an empty answer, and not parsed.
    """

    metric: ClassVar[Metric] = ACCURACY
    is_binary: ClassVar[bool] = True
    """Whether every item scores 0 or 1 (what Wilson intervals need)."""

    first_line: bool = False
    """Score only the first line that holds anything, for models that add reasons behind their answer."""

    def score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...] = ()) -> Score:
        """Score a prediction against the gold answers. Raises DataError when the gold cannot be scored by this rule."""
        answer = without_thinking(prediction)
        if self.first_line:
            answer = next((line for line in answer.splitlines() if line.strip()), "")
        score = self._score(answer, answers, choices)
        if answer == prediction or not has_thinking(prediction):
            return score
        return replace(score, is_parsed=score.is_parsed and bool(answer.strip()), has_thinking=True)

    @abstractmethod
    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        """Score a prediction without thinking, as `score`."""


SCORERS: Registry[type[Scorer]] = Registry("scorer")


def build_scorer(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """The scorer `name` with its options. Raises UsageError on an unknown name or option, with the nearest valid."""
    kind = SCORERS.get(name)
    for option in options or {}:
        if option not in kind.model_fields:
            raise UsageError(f"scorer '{name}' has no option '{option}'; {nearest(option, kind.model_fields)}")
    try:
        return kind(**(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"scorer '{name}', option '{field}': {complaint(first, kind)}") from None


def _require_answers(answers: tuple[str, ...]) -> None:
    if not answers:
        raise DataError("no gold answer to score against; give `answer` or `answers`")


@SCORERS.register("exact_match")
class ExactMatch(Scorer):
    """1 when the prediction equals any gold answer after NFC, stripping, collapsing white space and case-folding."""

    case_sensitive: bool = False
    """Keep the case of both sides."""

    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        _require_answers(answers)
        found = normalise(prediction, case_sensitive=self.case_sensitive)
        return Score(float(any(found == normalise(a, case_sensitive=self.case_sensitive) for a in answers)))


_SIGNS = re.compile(r"[%$€£¥\s]|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_YEAR = re.compile(r"[12][0-9]{3}")


@SCORERS.register("relaxed_accuracy")
class RelaxedAccuracy(Scorer):
    """ChartQA: numbers within a relative tolerance, everything else equal without regard to case.

    `published` is the rule of published figures: `15%` reads as 0.15, so `15` against `15%` is wrong; a gold zero has
    no relative distance and needs the same text; `1,000` and `$12` are no numbers and match only as text; years are
    numbers, so that 2019 is right for 2010. `corrected` is for figures of one's own: percent and currency signs do not
    count, digits may be grouped, a gold zero needs a zero, and a gold year (a whole number from 1000 to 2999 without
    any sign) needs the same year. Both compare in floating point.
    """

    rule: Literal["published", "corrected"] = "published"
    """Which numbers are the same."""
    tolerance: Annotated[Number, Field(ge=0, le=1000)] = 0.05
    """Largest relative distance |prediction - gold| / |gold| that counts as right."""

    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        _require_answers(answers)
        return Score(float(any(self._matches(prediction, answer) for answer in answers)))

    def _matches(self, prediction: str, answer: str) -> bool:
        if self.rule == "corrected":
            return self._matches_corrected(prediction, answer)
        found, gold = parse_number(prediction), parse_number(answer)
        if found is not None and gold is not None and gold != 0.0:
            return abs(found - gold) / abs(gold) <= self.tolerance
        return normalise(prediction) == normalise(answer)

    def _matches_corrected(self, prediction: str, answer: str) -> bool:
        found, gold = (parse_number(_SIGNS.sub("", text).rstrip(".")) for text in (prediction, answer))
        if found is None or gold is None:
            return normalise(prediction) == normalise(answer)
        if _YEAR.fullmatch(answer.strip()) or gold == 0.0:
            return found == gold
        return abs(found - gold) / abs(gold) <= self.tolerance


@SCORERS.register("anls")
class AverageNormalisedLevenshteinSimilarity(Scorer):
    """ANLS: the best 1 - NL over the answers where NL < threshold, else 0; NL = edit distance / longer length.

    Both sides are stripped, white space collapsed and case-folded first, and their normalised lengths count.
    """

    metric: ClassVar[Metric] = ANLS
    is_binary: ClassVar[bool] = False

    threshold: Annotated[Share, Field(gt=0)] = 0.5
    """Normalised distance from which an answer scores nothing."""
    compatible: bool = False
    """Score as common evaluation suites do: a distance equal to the threshold counts, and lengths are taken before
    white space is collapsed."""

    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        _require_answers(answers)
        return Score(max(self._similarity(prediction, answer) for answer in answers))

    def _similarity(self, prediction: str, answer: str) -> float:
        found, gold = normalise(prediction), normalise(answer)
        length = max(len(prediction), len(answer)) if self.compatible else max(len(found), len(gold))
        distance = edit_distance(found, gold) / length if length else 0.0
        counts = distance < self.threshold or (self.compatible and distance == self.threshold)
        return 1.0 - distance if counts else 0.0


@SCORERS.register("character_error_rate")
class CharacterErrorRate(Scorer):
    """Edit distance over gold length; the figure of a set is all edits over all gold characters. Lower is better.

    White space is stripped and collapsed on both sides. Of several gold answers the one with the lowest rate counts.
    """

    metric: ClassVar[Metric] = CHARACTER_ERROR_RATE
    is_binary: ClassVar[bool] = False

    case_sensitive: bool = True
    """Whether a wrong case is an error."""

    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        _require_answers(answers)
        found = normalise(prediction, case_sensitive=self.case_sensitive)
        golds = [normalise(answer, case_sensitive=self.case_sensitive) for answer in answers]
        if not all(golds):
            raise DataError("an empty gold answer has no character error rate; remove it or choose another scorer")
        scores = [Score(float(edit_distance(found, gold)), float(len(gold))) for gold in golds]
        return min(scores, key=lambda score: score.value)


@SCORERS.register("vqa_soft")
class SoftVqaAccuracy(Scorer):
    """Soft VQA accuracy: mean over annotators of min(1, matches among the *other* annotators / 3)."""

    is_binary: ClassVar[bool] = False

    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        if len(answers) < 4:
            raise DataError(
                f"soft VQA accuracy needs the answers of at least 4 annotators (10 are usual), found {len(answers)}; "
                "score with exact_match instead"
            )
        found = normalise_vqa(prediction)
        counts = Counter(normalise_vqa(answer) for answer in answers)
        matches, total = counts[found], len(answers)
        # Leaving out an annotator who gave this answer leaves matches - 1; leaving out another one leaves matches.
        left_out = matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)
        return Score(left_out / total)


@SCORERS.register("multiple_choice")
class MultipleChoice(Scorer):
    """The choice named by its text or by its letter (A for the first). What names none is wrong and counted apart.

    Read by `choices.read_choice`, whose rules are: stated answers (`the answer is B`) before an opening letter or
    choice (`B`, `(b) cat`), before a closing one (`…, so B`), before one choice that stands in the text. Reasons behind
    a letter may name other choices. A contradiction (`B. dog` where B is the cat) is wrong, never guessed.
    """

    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        _require_answers(answers)
        if not choices:
            raise DataError("multiple_choice needs the sample's `choices`; add them or choose another scorer")
        names = [normalise(choice) for choice in choices]
        golds = {self._gold(answer, names) for answer in answers}
        found = read_choice(prediction, names)
        return Score(0.0, is_parsed=False) if found is None else Score(float(found in golds))

    @staticmethod
    def _gold(answer: str, names: list[str]) -> str:
        name = normalise(answer)
        if name in names:
            return name
        if len(name) == 1 and 0 <= ord(name) - ord("a") < len(names):
            return names[ord(name) - ord("a")]
        raise DataError(f"gold answer {answer!r} is neither one of the choices {names} nor a letter of one")


@SCORERS.register("within_percent")
class WithinPercent(Scorer):
    """1 when the only number of the prediction lies within `percent` of the gold number; a gold zero needs a zero.

    A first line with one number is the answer, whatever numbers its reasons hold in the lines behind it.
    """

    percent: Annotated[Number, Field(ge=0, le=100_000)] = 10.0
    """Largest distance, in percent of the gold number."""

    def _score(self, prediction: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> Score:
        _require_answers(answers)
        golds = [find_number(answer) for answer in answers]
        if None in golds:
            raise DataError(f"gold answer {answers[golds.index(None)]!r} is not one number; choose another scorer")
        lines = [line for line in prediction.splitlines() if line.strip()]
        found = find_number(lines[0]) if lines else None
        if found is None:  # the answer stands behind its reasons, or there is none
            found = find_number(prediction)
        if found is None:
            return Score(0.0, is_parsed=False)
        # Multiplied out, so that 90 against 100 is inside 10 percent exactly, not up to rounding.
        hit = any(abs(found - gold) * 100.0 <= self.percent * abs(gold) for gold in golds if gold is not None)
        return Score(float(hit))
