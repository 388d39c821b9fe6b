"""Scoring rules: the traps as tables, independent oracles, and the contract that every registered scorer keeps."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.core.errors import DataError, UsageError
from unclipped.evaluation.scorers import SCORERS, build_scorer
from unclipped.evaluation.text import edit_distance, find_number, normalise, normalise_vqa, parse_number

GOLDS = {"vqa_soft": ("cat",) * 10, "within_percent": ("12",)}
"""Gold answers of the scorers that do not take one word."""
TEXTS = st.text(alphabet="abAB1. %,'éß\u0301 ", max_size=12)


def value(name: str, prediction: str, *answers: str, choices: tuple[str, ...] = (), **options: object) -> float:
    return build_scorer(name, options).score(prediction, answers, choices).value


@pytest.mark.parametrize(
    ("prediction", "answer", "options", "expected"),
    [
        ("Cat", "cat", {}, 1),
        ("  two \n words", "Two words", {}, 1),
        ("Cat", "cat", {"case_sensitive": True}, 0),
        ("cat.", "cat", {}, 0),
        ("STRASSE", "straße", {}, 1),
        ("e\u0301", "é", {}, 1),
        ("", "cat", {}, 0),
        ("", "", {}, 1),
    ],
)
def test_exact_match(prediction: str, answer: str, options: dict, expected: float) -> None:
    assert value("exact_match", prediction, answer, **options) == expected


def test_any_gold_answer_counts() -> None:
    assert value("exact_match", "sofa", "couch", "sofa") == 1
    assert value("anls", "sofa", "zzzz", "sofa") == 1
    assert value("character_error_rate", "sofa", "zzzz", "sofb") == 0.25


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("15%", "15%", 1),
        ("15", "15%", 0),  # 15 against 0.15
        ("0.15", "15%", 1),
        ("15.5%", "15%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # a gold zero has no relative distance
        ("0.001", "0", 0),
        ("1,000", "1000", 0),  # grouped digits are no number
        ("1,000", "1,000", 1),
        ("1000", "1,000", 0),
        ("Yes", "yes", 1),
        (" yes ", "yes", 1),
        ("nan", "nan", 1),
        ("inf", "5", 0),
        ("1_000", "1000", 0),
        ("1e3", "1000", 1),
        (".5", "0.5", 1),
        ("5.", "5", 1),
        ("about 5", "5", 0),
        ("", "5", 0),
        ("%", "5%", 0),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, expected: float) -> None:
    assert value("relaxed_accuracy", prediction, answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "options", "expected"),
    [
        ("hello", "hello", {}, 1.0),
        ("Hello ", "hello", {}, 1.0),
        ("a  b", "a b", {}, 1.0),
        ("hell", "hello", {}, 0.8),
        ("ab", "ax", {}, 0.0),  # distance exactly 0.5: the inequality is strict
        ("ab", "ax", {"compatible": True}, 0.5),
        ("abc", "xyz", {"compatible": True}, 0.0),
        ("", "", {}, 1.0),
        ("", "abc", {}, 0.0),
        ("a   c", "a b", {}, 1 - 1 / 3),
        ("a   c", "a b", {"compatible": True}, 1 - 1 / 5),  # length before white space is collapsed
        ("abcd", "abzz", {"threshold": 0.6}, 0.5),
    ],
)
def test_anls(prediction: str, answer: str, options: dict, expected: float) -> None:
    assert value("anls", prediction, answer, **options) == pytest.approx(expected)


def test_anls_equals_the_anls_package() -> None:
    anls_score = pytest.importorskip("anls").anls_score
    chooser = random.Random(0)
    for _ in range(500):
        answers = ["".join(chooser.choices("abC 1", k=chooser.randint(1, 8))) for _ in range(chooser.randint(1, 3))]
        prediction = "".join(chooser.choices("abC 1", k=chooser.randint(1, 8)))
        answers = [" ".join(answer.split()) or "a" for answer in answers]
        prediction = " ".join(prediction.split()) or "a"
        expected = anls_score(prediction=prediction, gold_labels=answers, threshold=0.5)
        assert value("anls", prediction, *answers) == pytest.approx(expected), (prediction, answers)


@pytest.mark.parametrize(
    ("prediction", "answer", "options", "expected"),
    [
        ("kitten", "sitting", {}, 3 / 7),
        ("ABC", "abc", {}, 1.0),
        ("ABC", "abc", {"case_sensitive": False}, 0.0),
        ("", "abc", {}, 1.0),
        ("abcdef", "abc", {}, 1.0),
        ("abcdefgh", "ab", {}, 3.0),  # an error rate can pass 1
        (" a  b ", "a b", {}, 0.0),
    ],
)
def test_character_error_rate(prediction: str, answer: str, options: dict, expected: float) -> None:
    score = build_scorer("character_error_rate", options).score(prediction, (answer,))
    assert score.value == pytest.approx(expected)
    assert score.denominator == len(normalise(answer))


def test_an_empty_gold_has_no_character_error_rate() -> None:
    with pytest.raises(DataError, match="empty gold answer"):
        value("character_error_rate", "a", " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red Cat.", "red cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("its", "its"),
        ("well", "well"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("yes!", "yes"),
        ("t-shirt", "t shirt"),
        ("a  man\nand a dog", "man and dog"),
        ("ten", "10"),
        ("", ""),
    ],
)
def test_vqa_normaliser(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_vqa_leaves_each_annotator_out(matches: int, expected: float) -> None:
    answers = ["A red one."] * matches + [f"other{index}" for index in range(10 - matches)]
    assert value("vqa_soft", "red 1", *answers) == pytest.approx(expected)


def test_soft_vqa_equals_its_definition() -> None:
    chooser = random.Random(1)
    for _ in range(100):
        answers = [chooser.choice(["cat", "dog", "the cat", "2", "two"]) for _ in range(10)]
        prediction = chooser.choice(["cat", "dog", "two", "bird"])
        shares = []
        for left_out in range(10):
            others = [answer for index, answer in enumerate(answers) if index != left_out]
            matches = sum(normalise_vqa(answer) == normalise_vqa(prediction) for answer in others)
            shares.append(min(1.0, matches / 3))
        assert value("vqa_soft", prediction, *answers) == pytest.approx(sum(shares) / 10)


def test_soft_vqa_needs_annotators() -> None:
    with pytest.raises(DataError, match="at least 4 annotators"):
        value("vqa_soft", "cat", "cat")


CHOICES = ("dog", "cat", "dark red", "red", "a bird")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected", "is_parsed"),
    [
        ("cat", "cat", 1, True),
        ("Cat.", "cat", 1, True),
        ("B", "cat", 1, True),
        ("b", "cat", 1, True),
        ("(B)", "cat", 1, True),
        ("B.", "cat", 1, True),
        ("B. cat", "cat", 1, True),
        ("(b) cat", "cat", 1, True),
        ("B) cat", "B", 1, True),
        ("The answer is B", "cat", 1, True),
        ("Answer: (b)", "cat", 1, True),
        ("The answer is B because of its fur", "cat", 1, True),
        ("the answer is a cat", "cat", 1, True),
        ("it is a dog I think", "dog", 1, True),
        ("A", "cat", 0, True),
        ("B. dog", "cat", 0, False),  # letter and text contradict each other
        ("dog or cat", "cat", 0, False),
        ("it is dark red", "dark red", 1, True),
        ("red", "dark red", 0, True),
        ("F", "cat", 0, False),
        ("catalogue", "cat", 0, False),
        ("", "cat", 0, False),
        ("fish", "cat", 0, False),
        ("A bird", "a bird", 1, True),
    ],
)
def test_multiple_choice(prediction: str, answer: str, expected: float, is_parsed: bool) -> None:
    score = build_scorer("multiple_choice").score(prediction, (answer,), CHOICES)
    assert (score.value, score.is_parsed) == (expected, is_parsed)


# What other harnesses are known to read wrongly: the text, the choices, and the choice that it names (None: unparsed).
COLOURS = ("red", "green", "yellow", "white")
THINGS = ("car", "dog", "tree", "house")
TRAPS = [
    ("The answer is (B).", COLOURS, "green"),
    ("It is a butterfly, so B", COLOURS, "green"),
    ("Cannot be determined", COLOURS, None),
    ("Answer: B", COLOURS, "green"),
    ("**B**", COLOURS, "green"),
    ("There is a dog", COLOURS, None),
    ("I think B is right, not A", COLOURS, "green"),
    ("Blue", COLOURS, None),
    ("dark", COLOURS, None),
    ("The answer is A", COLOURS, "red"),
    ("Dog", COLOURS, None),
    ("The object closer is the Desk", COLOURS, None),
    ("b", COLOURS, "green"),
    ("**C**", COLOURS, "yellow"),
    ("dog", THINGS, "dog"),
    ("The NASA logo", COLOURS, None),
    ("A dog is here", THINGS, "dog"),
    ("Based on the image, D", COLOURS, "white"),
    ("Cannot tell", COLOURS, None),
    ("All of them: B", COLOURS, "green"),
    ("Best answer: D", COLOURS, "white"),
]
READINGS = [
    # A letter or a choice, a line break, then reasons that name others.
    ("B\nThe car is smaller than the dog, and the tree is behind the house.", THINGS, "dog"),
    ("B\n\nReason: it is no car.", THINGS, "dog"),
    ("B.\nA car has wheels.", THINGS, "dog"),
    ("(B)\ncar and tree are wrong", THINGS, "dog"),
    ("b)\nOption A is a car.", THINGS, "dog"),
    ("**B**\n\n**Explanation:** the car is parked; (A) shows it.", THINGS, "dog"),
    ("**B. dog**\nThe car is parked.", THINGS, "dog"),
    ("Answer: B\nThe car is parked.", THINGS, "dog"),
    ("The answer is B.\nA car would have wheels. C is a tree.", THINGS, "dog"),
    ("B\nA is wrong because it is a car, C is not right.", THINGS, "dog"),
    ("dog\nThe car is parked.", THINGS, "dog"),
    ("Dog.\nThe car is parked.", THINGS, "dog"),
    ("B\r\nThe car is parked.", THINGS, "dog"),
    ("The answer is B because a car has wheels", THINGS, "dog"),
    ("B, since it is no car", THINGS, "dog"),
    ("B: dog. It is not a car.", THINGS, "dog"),
    ("B)dog\nThe car is parked.", THINGS, "dog"),
    ("B.dog", THINGS, "dog"),
    ("B\nB\nB", THINGS, "dog"),
    # Reasons first.
    ("The car is parked and the dog runs.\nB", THINGS, "dog"),
    ("The car is parked.\nFinal answer: (B)", THINGS, "dog"),
    ("First I thought the answer is A.\nFinal answer: B", THINGS, "dog"),
    ("A. car\nB. dog\nC. tree\nAnswer: B", THINGS, "dog"),
    ("The correct option is\nB", THINGS, "dog"),
    ("Therefore, the answer is \\boxed{B}.", THINGS, "dog"),
    ("\\boxed{\\text{B}}", THINGS, "dog"),
    # Forms of a letter.
    ("B.", THINGS, "dog"), ("B)", THINGS, "dog"), ("(b)", THINGS, "dog"), ("[B]", THINGS, "dog"),
    ("$B$", THINGS, "dog"),
    ("B) dog", THINGS, "dog"), ("B - dog", THINGS, "dog"), ("`B`", THINGS, "dog"), ("'B'", THINGS, "dog"),
    ("Option B", THINGS, "dog"), ("option b", THINGS, "dog"), ("I would go with B", THINGS, "dog"),
    ("Answer: **B**", THINGS, "dog"), ("answer: b", THINGS, "dog"), ("The answer is b", THINGS, "dog"),
    ('{"answer": "B"}', THINGS, "dog"), ("<answer>A</answer>", THINGS, "car"), ("\uff22", THINGS, "dog"),
    ("Answer: B, I think", THINGS, "dog"), ("The answer is a car", THINGS, "car"), ("answer is a", THINGS, "car"),
    ("The answer is most likely B.", THINGS, "dog"), ("Answer B", THINGS, "dog"), ("A: no. B: yes.", THINGS, None),
    ("Between A and B, the answer is B", THINGS, "dog"), ("A. Wrong\nB. Right", THINGS, None),
    ("B, no car", THINGS, "dog"), ("A. no", ("no", "yes"), "no"),
    ("I am sure it is the dog", THINGS, "dog"), ("the answer is: the dog", THINGS, "dog"),
    ("A", ("b", "a"), "a"), ("It is not visible", ("visible", "not visible"), "not visible"),
    ("Yes, there is no dog", ("yes", "no"), "yes"), ("The answer is 4.", ("3", "4"), "4"),
    # What is denied does not count, and what is unclear is never guessed.
    ("The answer is not A but B", THINGS, "dog"), ("Neither A nor C, so B", THINGS, "dog"),
    ("not a car but a dog", THINGS, "dog"), ("not A", THINGS, None), ("The answer is not A", THINGS, None),
    ("A is incorrect", THINGS, None), ("It isn't a car", THINGS, None), ("A or B", THINGS, None),
    ("A, B", THINGS, None), ("A and B", THINGS, None), ("AB", THINGS, None), ("A\nB", THINGS, None),
    ("Either A or B is correct", THINGS, None), ("The answer is A or B", THINGS, None),
    ("A. car\nB. dog", THINGS, None), ("B. car", THINGS, None), ("B\nThe answer is C", THINGS, None),
    ("car, dog", THINGS, None), ("E", THINGS, None), ("", THINGS, None), ("It shows vitamin D", COLOURS, None),
    ("I see a barn. E.g. this", COLOURS, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "choices", "named"), [*TRAPS, *READINGS])
def test_the_choice_that_a_text_names(text: str, choices: tuple[str, ...], named: str | None) -> None:
    scorer = build_scorer("multiple_choice")
    found = [choice for choice in choices if scorer.score(text, (choice,), choices).value == 1.0]
    assert found == ([] if named is None else [named])
    assert scorer.score(text, (choices[0],), choices).is_parsed == (named is not None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<think>A is a car. The answer is A.</think>B", "dog"),
        ("<think>\nIt could be A\n</think>\n\nThe answer is B", "dog"),
        ("It could be A, so A.</think>B", "dog"),  # a template opened it in the prompt
        ("<think>The answer is B", None),  # cut off
        ("<THINKING>A</THINKING> B", "dog"),
        ("<think></think>B", "dog"),
        ("<think>A</think>", None),
    ],
)
def test_thinking_is_stripped_and_recorded(text: str, named: str | None) -> None:
    score = build_scorer("multiple_choice").score(text, ("dog",), THINGS)
    assert (score.value, score.is_parsed, score.has_thinking) == (float(named == "dog"), named is not None, True)


@pytest.mark.parametrize("name", SCORERS.names())
def test_every_scorer_strips_thinking(name: str) -> None:
    answers = GOLDS.get(name, ("cat",))
    scorer, choices = build_scorer(name), ("dog", answers[0])
    plain, thought = (
        scorer.score(f"{start}{answers[0]}", answers, choices) for start in ("", "<think>dog 3</think>\n")
    )
    assert not plain.has_thinking
    assert thought == replace(plain, has_thinking=True)
    cut = scorer.score(f"<think>dog or {answers[0]}", answers, choices)
    assert not cut.is_parsed
    assert cut.value == scorer.score("", answers, choices).value


@pytest.mark.parametrize("name", SCORERS.names())
def test_the_first_line_alone_is_scored_when_asked(name: str) -> None:
    answers = GOLDS.get(name, ("cat",))
    text = f"<think>dog</think>\n\n{answers[0]}\nbecause of dogs 3 and 4"
    score = build_scorer(name, {"first_line": True}).score(text, answers, ("dog", answers[0]))
    assert score.value == (1.0 if SCORERS.get(name).metric.higher_is_better else 0.0)


@pytest.mark.parametrize(
    ("prediction", "answer", "published", "corrected"),
    [
        ("15%", "15", 0, 1),
        ("15", "15%", 0, 1),
        ("1,000", "1000", 0, 1),
        ("$12", "12", 0, 1),
        ("0", "0.0", 0, 1),
        ("1", "0", 0, 0),
        ("2019", "2010", 1, 0),
        ("2010", "2010", 1, 1),
        ("2010.", "2010", 1, 1),
        ("2,019", "2010", 0, 0),
        ("104", "100", 1, 1),
        ("106", "100", 0, 0),
        ("$1,040", "$1,000", 0, 1),
        ("12,5", "12,5", 1, 1),
        ("1,00", "100", 0, 0),
        ("Yes", "yes", 1, 1),
        ("15 %", "15%", 0, 1),
    ],
)
def test_both_rules_of_relaxed_accuracy(prediction: str, answer: str, published: int, corrected: int) -> None:
    assert value("relaxed_accuracy", prediction, answer) == published
    assert value("relaxed_accuracy", prediction, answer, rule="corrected") == corrected


def test_multiple_choice_checks_its_gold() -> None:
    with pytest.raises(DataError, match="neither one of the choices"):
        value("multiple_choice", "dog", "fish", choices=CHOICES)
    with pytest.raises(DataError, match="needs the sample's `choices`"):
        value("multiple_choice", "dog", "dog")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected", "is_parsed"),
    [
        ("19", "19", 1, True),
        ("90", "100", 1, True),
        ("110", "100", 1, True),
        ("89", "100", 0, True),
        ("18", "19", 1, True),
        ("17", "19", 0, True),
        ("1,050", "1000", 1, True),
        ("about 100 cells", "100", 1, True),
        ("100 or 110", "100", 0, False),
        ("many", "100", 0, False),
        ("0", "0", 1, True),
        ("1", "0", 0, True),
        ("12\nThere are 3 rows of 4.", "12", 1, True),
        ("There are 3 rows of 4.\n12", "12", 0, False),
        ("3 rows of 4\nso 12", "12", 0, False),
    ],
)
def test_within_percent(prediction: str, answer: str, expected: float, is_parsed: bool) -> None:
    score = build_scorer("within_percent").score(prediction, (answer,))
    assert (score.value, score.is_parsed) == (expected, is_parsed)


def test_within_percent_needs_a_number_as_gold() -> None:
    with pytest.raises(DataError, match="is not one number"):
        value("within_percent", "3", "three")


@pytest.mark.parametrize(
    ("text", "whole", "only"),
    [("12", 12, 12), ("-1.5e2", -150, -150), ("1,234.5", None, 1234.5), ("12,5", None, None), ("5%", 0.05, 5)],
)
def test_numbers(text: str, whole: float | None, only: float | None) -> None:
    assert parse_number(text) == whole
    assert find_number(text) == only


@settings(deadline=None, max_examples=60)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_equals_the_recursion(first: str, second: str) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        change = first[i - 1] != second[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + change)

    assert edit_distance(first, second) == distance(len(first), len(second)) == edit_distance(second, first)


# The contract: what holds for every registered scorer.


@pytest.mark.parametrize("name", SCORERS.names())
def test_contract_identity_is_perfect(name: str) -> None:
    answers = GOLDS.get(name, ("cat",))
    score = build_scorer(name).score(answers[0], answers, ("dog", answers[0]))
    assert score.value == (1.0 if SCORERS.get(name).metric.higher_is_better else 0.0)
    assert score.is_parsed


@pytest.mark.parametrize("name", SCORERS.names())
@settings(deadline=None, max_examples=40)
@given(prediction=TEXTS)
def test_contract_scores_are_bounded_and_pure(name: str, prediction: str) -> None:
    scorer, answers = build_scorer(name), GOLDS.get(name, ("cat",))
    score = scorer.score(prediction, answers, ("dog", answers[0]))
    assert score.denominator > 0
    assert score.numerator >= 0
    if scorer.metric.higher_is_better:
        assert score.value <= 1
    if scorer.is_binary:
        assert score.value in (0.0, 1.0)
    assert score == scorer.score(prediction, answers, ("dog", answers[0]))


@pytest.mark.parametrize("name", SCORERS.names())
def test_contract_no_gold_is_refused(name: str) -> None:
    with pytest.raises(DataError):
        build_scorer(name).score("cat", (), ("cat", "dog"))


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS)
def test_symmetric_rules(first: str, second: str) -> None:
    for name in ("exact_match", "anls"):
        assert value(name, first, second) == value(name, second, first)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'exact_match'"):
        build_scorer("exact_mach")
    with pytest.raises(UsageError, match="no option 'case_sens'; did you mean 'case_sensitive'"):
        build_scorer("exact_match", {"case_sens": True})
    with pytest.raises(UsageError, match="option 'percent'"):
        build_scorer("within_percent", {"percent": "ten"})


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("B\nOption A is a cat, option C is a bird.", ["cat", "dog", "bird", "fish"], "dog"),
        ("B. dog\n(A) is a cat and (C) is a bird", ["cat", "dog", "bird", "fish"], "dog"),
        ("2.5", ["1", "2", "3", "4"], None),
        ("-2", ["1", "2", "3", "4"], None),
        ("5,000", ["0.5", "5", "50"], None),
        ("5.5", ["0.5", "5", "50"], None),
        ("I count 5.", ["0.5", "5", "50"], "5"),
        ("5, I think", ["0.5", "5", "50"], "5"),
        ("it is 0.5, not more", ["0.5", "5", "50"], "0.5"),
    ],
)
def test_reasons_behind_a_choice_and_parts_of_numbers(text: str, choices: list[str], expected: str | None) -> None:
    from unclipped.evaluation.choices import read_choice

    assert read_choice(text, choices) == expected


def test_numbers_beyond_floats_are_no_numbers() -> None:
    from unclipped.evaluation.text import find_number, parse_number

    assert parse_number("1e400") is None
    assert parse_number("-1e999%") is None
    assert find_number("about " + "9" * 400) is None
    assert parse_number("1e300") == 1e300


def test_the_answer_to_an_earlier_question_is_no_gold_answer() -> None:
    from unclipped.data.sample import Sample, TextPart, Turn
    from unclipped.evaluation.config import TaskConfig
    from unclipped.evaluation.questions import gold_of

    said = [("user", "first?"), ("assistant", "ONE"), ("user", "second?")]
    turns = tuple(Turn(role, (TextPart(text),)) for role, text in said)
    task = TaskConfig.model_validate({"name": "open", "source": {"source": "rows.jsonl"}})
    assert gold_of(Sample("a", turns[:2]), task) == ("ONE",)
    assert gold_of(Sample("a", turns, answers=("TWO",)), task) == ("TWO",)
    with pytest.raises(DataError, match="has no gold answer"):
        gold_of(Sample("a", turns), task)
