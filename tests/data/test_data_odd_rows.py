"""Rows as other programs write them: gaps, NaN, several names for one field, images inside messages, indices."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.rows import WRITERS, as_jsonl, as_parquet, error_of
from support.tiny_models import tiny_tokenizer
from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.sample import Sample, TextPart
from unclipped.data.sources import open_source
from unclipped.encoding.examples import encode_sample

NAN, INF = float("nan"), float("inf")
QA = {"question": "colour?", "answer": "red"}
ASK = {"from": "human", "value": "one?"}
SAY = {"from": "gpt", "value": "yes"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (10, 20, 30)).save(folder / name)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


def shape(sample: Sample) -> list[tuple[str, list[str]]]:
    """Turns as (role, parts), images by file name."""
    return [
        (
            turn.role,
            [part.text if isinstance(part, TextPart) else f"[{os.path.basename(part.label)}]" for part in turn.parts],
        )
        for turn in sample.turns
    ]


# The first name that holds something


@WRITERS
def test_image_null_next_to_images_list_keeps_the_images(folder: Path, write: Any) -> None:
    rows = [
        {**QA, "image": "a.png", "images": None},
        {**QA, "image": None, "images": ["a.png", "b.png"]},
        {**QA, "image": "", "images": ["b.png"]},
        {**QA, "image": None, "images": []},
    ]
    source = write(folder, rows)
    assert [len(source[index].images) for index in range(4)] == [1, 2, 1, 0]


@WRITERS
def test_answer_null_next_to_answers_list_keeps_the_answers(folder: Path, write: Any) -> None:
    rows = [
        {"question": "colour?", "answer": None, "answers": ["red", "scarlet"]},
        {"question": "colour?", "answer": "", "answers": ["blue"]},
        {"question": "colour?", "answer": "green", "answers": []},
    ]
    source = write(folder, rows)
    assert [source[index].answers for index in range(3)] == [("red", "scarlet"), ("blue",), ("green",)]


@WRITERS
def test_question_null_next_to_prompt_asks_the_prompt(folder: Path, write: Any) -> None:
    rows = [
        {"question": None, "prompt": "colour?", "answer": "red"},
        {"question": "how?", "prompt": None, "answer": "so"},
    ]
    source = write(folder, rows)
    assert [source[index].question for index in range(2)] == ["colour?", "how?"]


def test_an_empty_question_may_be_answered(folder: Path) -> None:
    source = as_jsonl(
        folder, [{"image": "a.png", "question": "", "answer": "a cat"}, {"image": "a.png", "question": None}]
    )
    assert shape(source[0]) == [("user", ["[a.png]", ""]), ("assistant", ["a cat"])]
    assert "'question': empty, and so is 'prompt'" in error_of(source, 1)


@WRITERS
@pytest.mark.parametrize("format", ["llava", "sharegpt", "cambrian"])
def test_conversations_take_the_image_field_that_holds_something(folder: Path, write: Any, format: str) -> None:
    turns = [{"from": "human", "value": "<image>one?"}, SAY]
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "images": None, "conversations": turns},
        {"image": None, "images": ["b.png"], "conversations": turns},
        {"image": None, "images": [], "conversations": [ASK, SAY]},
    ]
    source = write(folder, rows, format="auto" if write is as_parquet else format)
    assert [[part.label for part in source[index].images] for index in range(3)] == [
        [str(folder / "a.png")],
        [str(folder / "b.png")],
        [],
    ]


@WRITERS
def test_messages_null_next_to_conversations_reads_the_conversations(folder: Path, write: Any) -> None:
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": None, "conversations": [ASK, SAY]}, {"messages": messages, "conversations": None}]
    source = write(folder, rows, **({"format": "sharegpt"} if write is as_jsonl else {}))
    assert [source[index].answer for index in range(2)] == ["yes", "no"]


@WRITERS
def test_caption_null_next_to_text_keeps_the_text(folder: Path, write: Any) -> None:
    rows = [
        {"image": "a.png", "caption": "a cat", "text": None},
        {"image": "b.png", "caption": None, "text": "a dog"},
        {"image": "b.png", "caption": " ", "text": "a cow"},
    ]
    source = write(folder, rows)
    assert [source[index].answer for index in range(3)] == ["a cat", "a dog", "a cow"]


def test_a_pair_takes_images_where_image_is_null(folder: Path) -> None:
    source = as_jsonl(folder, [{"image": None, "images": ["a.png"], "caption": "a cat"}])
    assert shape(source[0]) == [("user", ["[a.png]"]), ("assistant", ["a cat"])]


def test_rows_of_a_table_are_read_by_what_they_hold(folder: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "no"}], "query": None},
        {"messages": None, "query": "one?", "response": "yes"},
    ]
    source = as_parquet(folder, rows)
    assert [source[index].answer for index in range(2)] == ["no", "yes"]


def test_text_of_a_turn_may_be_under_the_second_key(folder: Path) -> None:
    turns = [{"from": None, "role": "user", "value": None, "content": "one?"}, {"role": "assistant", "content": "yes"}]
    assert shape(as_parquet(folder, [{"messages": turns}])[0]) == [("user", ["one?"]), ("assistant", ["yes"])]


# Answers that are not there


@WRITERS
@pytest.mark.parametrize(
    "turn",
    [{"from": "gpt", "text": "lost"}, {"from": "gpt", "value": ""}, {"from": "gpt", "value": None}, {"from": "gpt"},
     {"from": "gpt", "value": " \n"}],
    ids=["misspelt", "empty", "null", "none", "blank"],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True], ids=["middle", "last"])
def test_an_empty_answer_in_any_turn_names_turn_and_keys(folder: Path, write: Any, turn: dict, last: bool) -> None:
    turns = [ASK, SAY, ASK, turn] if last else [ASK, turn, ASK, SAY]
    message = error_of(write(folder, [{"id": "s", "conversations": turns}]))
    assert f"conversations[{3 if last else 1}]" in message or f"messages[{3 if last else 1}]" in message
    assert "the answer is empty" in message
    if write is as_jsonl:
        assert f"found the keys {', '.join(sorted(turn))}" in message


def test_a_question_under_a_misspelt_key_names_turn_and_keys(folder: Path) -> None:
    message = error_of(as_jsonl(folder, [{"conversations": [{"from": "human", "text": "lost?"}, SAY]}]))
    assert "conversations[0]" in message
    assert "found the keys from, text" in message


def test_parts_without_text_are_an_empty_answer(folder: Path) -> None:
    content = [{"type": "text", "text": ""}]
    rows = [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": content}]}]
    assert "messages[1]" in error_of(as_jsonl(folder, rows))


def test_an_empty_answer_of_a_sample_made_in_python_is_refused() -> None:
    from unclipped.data.sample import Turn

    talk = [("user", "one?"), ("assistant", " "), ("user", "two?"), ("assistant", "yes")]
    sample = Sample("s", tuple(Turn(role, (TextPart(text),)) for role, text in talk))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="sample s: no supervised token in turn 1"):
        encode_sample(sample, tiny_tokenizer())


@pytest.mark.parametrize("answers", [["", "red"], ["red", " "]])
def test_an_empty_accepted_answer_is_refused(folder: Path, answers: list[str]) -> None:
    assert "'answers[" in error_of(as_jsonl(folder, [{"question": "q", "answers": answers}]))


# Values that are no text


@WRITERS
def test_not_a_number_is_missing(folder: Path, write: Any) -> None:
    rows = [
        {"id": "a", "question": "q", "answer": 1.0, "score": NAN, "category": 2.0, "cluster": NAN},
        {"id": "b", "question": "q", "answer": NAN, "score": 1.5, "category": NAN, "cluster": 3.0},
    ]
    source = write(folder, rows)
    assert (source[0].answer, source[0].category, source[0].cluster) == ("1", "2", None)
    assert (source[1].answers, source[1].category, source[1].cluster) == ((), None, "3")
    assert len(source[1].turns) == 1
    if write is as_jsonl:
        assert source[0].metadata == {}


@WRITERS
def test_whole_floats_are_integers_and_others_stay(folder: Path, write: Any) -> None:
    rows = [{"id": 7.0, "question": "q", "answer": 5.0}, {"id": NAN, "question": "q", "answer": 2.5}]
    source = write(folder, rows)
    assert (source[0].id, source[0].answer) == ("7", "5")
    assert (source[1].id, source[1].answer) == ("train-1", "2.5")


NO_TEXT = [
    ("id", True, "a boolean"),
    ("question", True, "a boolean"),
    ("answer", True, "a boolean"),
    ("answer", [False, True], "a boolean"),
    ("answer", INF, "infinity"),
    ("answers", [-INF], "infinity"),
    ("category", False, "a boolean"),
    ("cluster", INF, "infinity"),
    ("choices", [True, False], "a boolean"),
    ("choices", [1.5, INF], "infinity"),
    ("choices", [1.5, NAN], "missing"),
]


@WRITERS
@pytest.mark.parametrize(("field", "value", "found"), NO_TEXT, ids=[f"{f}-{v}" for f, v, _ in NO_TEXT])
def test_booleans_and_infinities_are_refused(folder: Path, write: Any, field: str, value: Any, found: str) -> None:
    row = {"question": "q", "answer": "red", field: value}
    if field == "answers":
        del row["answer"]
    message = error_of(write(folder, [row]))
    assert f"'{field}" in message
    assert found in message


@pytest.mark.parametrize("value", [True, INF])
def test_turns_and_captions_of_no_text_are_refused(folder: Path, value: Any) -> None:
    assert "conversations[1]" in error_of(as_jsonl(folder, [{"conversations": [ASK, {"from": "gpt", "value": value}]}]))
    assert "'caption'" in error_of(as_jsonl(folder, [{"image": "a.png", "caption": value}]))
    assert "'system'" in error_of(as_jsonl(folder, [{"system": value, "conversations": [ASK, SAY]}]))


def test_an_image_that_is_not_a_number_is_no_image(folder: Path) -> None:
    assert as_jsonl(folder, [{**QA, "image": NAN}])[0].images == ()
    assert "found a boolean" in error_of(as_jsonl(folder, [{**QA, "image": True}]))


# the_cauldron


@WRITERS
def test_rows_of_texts_with_user_and_assistant_are_read(folder: Path, write: Any) -> None:
    texts = [
        {"user": "one?", "assistant": "yes", "source": "set"},
        {"user": "two?", "assistant": "no", "source": "set"},
    ]
    source = write(folder, [{"images": ["a.png", "b.png"], "texts": texts}, {"images": None, "texts": texts[:1]}])
    assert shape(source[0]) == [
        ("user", ["[a.png]", "[b.png]", "one?"]),
        ("assistant", ["yes"]),
        ("user", ["two?"]),
        ("assistant", ["no"]),
    ]
    assert shape(source[1]) == [("user", ["one?"]), ("assistant", ["yes"])]
    assert source[0].answers == ("no",)


def test_texts_with_images_as_bytes_are_read_from_parquet(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = datasets.List(datasets.Image())
    text = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    table = datasets.Dataset.from_dict(
        {
            "images": [[{"bytes": (folder / "a.png").read_bytes(), "path": None}]],
            "texts": [[{"user": "one?", "assistant": "yes", "source": "set"}]],
        },
        features=datasets.Features({"images": images, "texts": [text]}),
    )
    table.to_parquet(str(folder / "train.parquet"))
    sample = open_source(SourceConfig(source=str(folder)))[0]
    assert (sample.question, sample.answer, len(sample.images)) == ("one?", "yes", 1)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ({"user": "one?", "asistant": "yes"}, "asistant, user"),
        ({"user": "one?", "assistant": ""}, "assistant, user"),
        ({"user": None, "assistant": "yes"}, "assistant, user"),
    ],
)
def test_texts_with_a_gap_name_turn_and_keys(folder: Path, text: dict, keys: str) -> None:
    good = {"user": "one?", "assistant": "yes"}
    message = error_of(as_jsonl(folder, [{"texts": [good, text]}]))
    assert "texts[1]" in message
    assert f"found the keys {keys}" in message


# Images inside messages


def inline(part: dict[str, Any], **fields: Any) -> dict[str, Any]:
    question = {"role": "user", "content": [part, {"type": "text", "text": "\nwhat is <image>?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    return {"messages": [question, answer], **fields}


@WRITERS
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_an_image_inside_a_message_is_read_as_chat_does(folder: Path, write: Any, part: dict) -> None:
    sample = write(folder, [inline(part)])[0]
    assert shape(sample) == [("user", ["[a.png]", "\nwhat is <image>?"]), ("assistant", ["red"])]
    assert sample.images[0].source == str(folder / "a.png")


def test_encoded_images_and_addresses_inside_messages_are_read(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    text = base64.b64encode(content).decode()
    parts = [
        {"type": "image", "base64": text},
        {"type": "image", "image": f"data:image/png;base64,{text}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
    ]
    for part in parts:
        assert as_jsonl(folder, [inline(part)])[0].images[0].source == content
    address = (folder / "a.png").as_uri()
    assert str(as_jsonl(folder, [inline({"type": "image", "url": address})])[0].images[0].source) == str(
        folder / "a.png"
    )


def test_addresses_in_an_image_field_are_read_as_inside_messages(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    text = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    assert as_jsonl(folder, [{**QA, "image": text}])[0].images[0].source == content
    assert "not fetched from the network" in error_of(as_jsonl(folder, [{**QA, "image": "https://example.org/a.png"}]))


def test_images_inside_messages_as_bytes_are_read_from_parquet(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    row = inline({"type": "image", "image": {"bytes": content, "path": None}})
    assert as_parquet(folder, [row])[0].images[0].source == content


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        (inline({"type": "image", "image": "no.png"}), ["messages[0]", "no.png"]),
        (
            inline({"type": "image", "url": "https://example.org/a.png"}),
            ["messages[0]", "not fetched from the network"],
        ),
        (inline({"type": "image", "base64": "?"}), ["messages[0]", "not valid base64"]),
        (inline({"type": "image", "img": "a.png"}), ["0 images", "1 "]),
        (inline({"type": "image", "image": "a.png"}, images=["b.png"]), ["1 images"]),
        (inline({"type": "video", "video": "a"}), ["messages[0]", "type text or image"]),
        (
            {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [{"type": "image"}]}]},
            ["messages[1]", "only user turns"],
        ),
    ],
)
def test_images_inside_messages_that_cannot_be_read_are_named(folder: Path, row: dict, pieces: list[str]) -> None:
    message = error_of(as_jsonl(folder, [row]))
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a caption", "image": "a.png"},
        {"question": "q", "answer": "a", "text": "context", "image": "a.png"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "text": "t"},
    ],
)
def test_rows_of_other_formats_behind_a_text_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"text": "a"}, row)))
    with pytest.raises(DataError, match="row 2: has the fields of format"):
        open_source(SourceConfig(source=str(path)))


def test_an_array_of_texts_is_not_read_as_its_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    with pytest.raises(DataError, match="save it as JSONL"):
        open_source(SourceConfig(source=str(path)))
