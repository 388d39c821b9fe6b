"""The rule that keeps held-out words and numbers out of training, whatever they are part of."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.core.errors import UsageError
from unclipped.data.generated.dice import Dice
from unclipped.data.generated.vocabulary import (
    SPLITS,
    Vocabulary,
    is_held_out,
    parts_of,
    split_of,
    split_of_part,
)
from unclipped.data.generated.words import ENGLISH, LABELS


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ban", ["ban"]),
        ("Bano", ["ban", "ano"]),
        ("147", ["14", "47"]),
        ("105", ["10"]),
        ("12.47", ["12", "47"]),
        ("7", []),
        ("no", []),
        ("ab12", ["12"]),
    ],
)
def test_parts(text: str, parts: list[str]) -> None:
    assert parts_of(text) == parts


def test_every_digit_count_has_its_shares() -> None:
    splits = [split_of(str(number)) for number in range(10, 100)]
    assert (splits.count("test"), splits.count("val"), splits.count("train")) == (18, 9, 63)
    splits = [split_of(str(number)) for number in range(100, 1000)]
    assert splits.count("test") > 180
    assert splits.count("val") > 90
    assert splits.count("train") > 360


def test_word_shares() -> None:
    words = [a + b + c for a in "bcdfghjklmnprstvwz" for b in "aeiou" for c in "bcdfghjklmnprstvwz"]
    shares = {split: sum(split_of(word) == split for word in words) / len(words) for split in SPLITS}
    assert shares["test"] == pytest.approx(0.12, abs=0.03)
    assert shares["val"] == pytest.approx(0.06, abs=0.02)


def test_assignment_is_the_same_in_every_process() -> None:
    strings = ["ban", "kel", "moza", "47", "83", "apple", "12.47"]
    code = f"from unclipped.data.generated.vocabulary import split_of; print([split_of(s) for s in {strings}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str([split_of(text) for text in strings])


def test_train_shows_every_digit_at_every_place() -> None:
    seen = [text for text in map(str, range(10, 100)) if split_of(text) == "train"]
    assert {text[0] for text in seen} == set("123456789")
    assert {text[1] for text in seen} == set("0123456789")


def test_labels_are_never_held_out() -> None:
    assert not [label for label in LABELS if is_held_out(label)]
    assert not [number for number in range(0, 101, 10) if is_held_out(str(number))]


@settings(max_examples=60, deadline=None)
@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789.", min_size=1, max_size=12), st.data())
def test_what_is_held_out_stays_held_out_inside_longer_strings(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    piece = text[start : data.draw(st.integers(start + 1, len(text)))]
    # A digit after a cut may stand first in the piece though a zero stood before it: parts never appear from nowhere.
    assert set(parts_of(piece)) <= set(parts_of(text))
    if is_held_out(piece):
        assert is_held_out(text)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**6), st.integers(3, 8), st.integers(1, 6))
def test_vocabulary_keeps_to_its_split(split: str, seed: int, letters: int, digits: int) -> None:
    vocabulary = Vocabulary(split, word_length=(3, letters), digits=(1, digits))  # type: ignore[arg-type]
    dice = Dice(str(seed))
    word, number = vocabulary.word(dice), vocabulary.number(dice)
    assert 3 <= len(word) <= letters
    assert split_of(word) == split
    assert len(number) <= digits
    assert split_of(number) in ("train", split)
    assert vocabulary.allows(word)
    assert vocabulary.allows(number)


def test_val_and_test_mix_seen_and_held_out_numbers() -> None:
    for split in ("val", "test"):
        for share in (0.0, 0.5, 1.0):
            vocabulary = Vocabulary(split, held_out_numbers=share)
            dice = Dice("mix")
            held_out = [is_held_out(vocabulary.number(dice)) for _ in range(400)]
            assert sum(held_out) / 400 == pytest.approx(share, abs=0.1)


def test_english_words() -> None:
    assert len(set(ENGLISH)) == len(ENGLISH)
    assert all(word.isalpha() and word.islower() and len(word) >= 3 for word in ENGLISH)
    sizes = {split: sum(split_of(word) == split for word in ENGLISH) for split in SPLITS}
    assert min(sizes.values()) >= 40, sizes
    with pytest.raises(UsageError, match="word_length"):
        Vocabulary("val", words="english", word_length=(8, 8))


def test_part_splits_cover_all_three() -> None:
    assert {split_of_part(str(number)) for number in range(10, 100)} == set(SPLITS)
