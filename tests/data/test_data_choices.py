"""Answers of multiple choice: when a number is the index of a choice and when it is text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.rows import WRITERS, as_jsonl, as_parquet, error_of
from unclipped.core.errors import DataError, UsageError

NAN = float("nan")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


@WRITERS
def test_a_number_next_to_choices_is_the_index_of_the_choice(folder: Path, write: Any) -> None:
    rows = [
        {"question": "q", "choices": ["cat", "dog"], "answer": 1},
        {"question": "q", "choices": ["cow", "hen", "ox"], "answer": 0},
        {"question": "q", "choices": ["0", "1"], "answer": 1},  # both readings name the same choice
    ]
    source = write(folder, rows)
    assert [source[index].answers for index in range(3)] == [("dog",), ("cow",), ("1",)]


def test_an_index_in_a_float_column_with_gaps_is_an_index(folder: Path) -> None:
    rows = [{"question": "q", "choices": ["cat", "dog"], "answer": answer} for answer in (1.0, NAN)]
    source = as_parquet(folder, rows)
    assert [source[index].answers for index in range(2)] == [("dog",), ()]


@pytest.mark.parametrize(
    ("choices", "answer", "pieces"),
    [
        (["1", "2", "3"], 1, ["the number 1", "choice '1'", "choice '2'", "answer_is"]),
        ([1, 2, 3], 2, ["answer_is"]),
        (["cat", "dog"], 2, ["index 2", "0 to 1", "answer_is"]),
        (["cat", "dog"], -1, ["index -1", "0 to 1"]),
        (["cat", "dog"], "1", ["'1'", "answer_is"]),
    ],
)
def test_a_number_that_may_be_index_or_text_is_refused(folder: Path, choices: list, answer: Any, pieces: list) -> None:
    message = error_of(as_jsonl(folder, [{"question": "q", "choices": choices, "answer": answer}]))
    assert "'answer'" in message
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize(
    ("answer_is", "choices", "answer", "expected"),
    [
        ("text", ["1", "2", "3"], 1, "1"),
        ("text", ["cat", "dog"], 1, "1"),
        ("index_from_0", ["1", "2", "3"], 1, "2"),
        ("index_from_1", ["1", "2", "3"], 3, "3"),
        ("index_from_1", ["cat", "dog"], 1, "cat"),
        ("index_from_1", ["cat", "dog"], "2", "dog"),
        ("index_from_0", ["cat", "dog"], "cat", "cat"),
    ],
)
def test_an_option_says_what_numbers_of_a_source_are(
    folder: Path, answer_is: str, choices: list, answer: Any, expected: str
) -> None:
    row = {"question": "q", "choices": choices, "answer": answer}
    assert as_jsonl(folder, [row], options={"answer_is": answer_is})[0].answers == (expected,)


def test_texts_and_letters_next_to_choices_stay(folder: Path) -> None:
    rows = [
        {"question": "q", "choices": ["1", "2"], "answer": "2"},
        {"question": "q", "choices": ["a", "b"], "answer": "B"},
    ]
    source = as_jsonl(folder, rows)
    assert [source[index].answers for index in range(2)] == [("2",), ("B",)]
    with pytest.raises(UsageError, match="answer_is: expected text, index_from_0 or index_from_1"):
        as_jsonl(folder, rows, options={"answer_is": "index"})
    with pytest.raises(DataError, match=r"index 0.*1 to 2"):
        as_jsonl(folder, [{**rows[0], "answer": 0}], options={"answer_is": "index_from_1"})[0]


def test_the_label_of_images_is_no_index(folder: Path) -> None:
    sample = as_parquet(folder, [{"image": "a.png", "label": 1.0}])[0]
    assert (sample.images[0].source, sample.category) == (str(folder / "a.png"), "1")
