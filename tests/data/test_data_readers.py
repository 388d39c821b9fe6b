"""Readers: each format gives the same kind of sample, read lazily, the format told by content."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.rows import JsonlRows
from unclipped.data.sample import ImagePart, Sample, TextPart
from unclipped.data.sources import Source, open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one.png", "two.png"):
        Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / name)
    return tmp_path


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, **fields: object) -> Source:
    return open_source(SourceConfig(source=str(path), **fields))


def described(sample: Sample) -> list[tuple[str, list[str]]]:
    """Turns as (role, parts), images by file name."""
    return [
        (
            turn.role,
            [part.text if isinstance(part, TextPart) else f"[{os.path.basename(part.label)}]" for part in turn.parts],
        )
        for turn in sample.turns
    ]


ASKED = [("user", ["[one.png]", "what?"]), ("assistant", ["red"])]
CONVERSATION = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("qa.jsonl", [{"id": "a", "image": "one.png", "question": "what?", "answer": "red"}]),
        ("llava.jsonl", [{"id": "a", "image": "one.png", "conversations": CONVERSATION}]),
        ("sharegpt.jsonl", [{"id": "a", "images": ["one.png"], "conversations": CONVERSATION}]),
        (
            "messages.jsonl",
            [
                {
                    "id": "a",
                    "images": ["one.png"],
                    "messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}],
                }
            ],
        ),
        (
            "parts.jsonl",
            [
                {
                    "id": "a",
                    "images": ["one.png"],
                    "messages": [
                        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                    ],
                }
            ],
        ),
    ],
)
def test_every_format_is_told_by_content_and_gives_the_same_sample(folder: Path, name: str, rows: list[dict]) -> None:
    sample = opened(jsonl(folder / name, rows))[0]
    assert sample.id == "a"
    assert described(sample) == ASKED
    assert sample.answers == ("red",)
    assert sample.answer == "red"


def test_llava_as_one_json_array(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps([{"id": 7, "image": "one.png", "conversations": CONVERSATION}]))
    source = opened(folder)
    assert source.length == 1
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    assert source[0].id == "7"
    assert described(source[0]) == ASKED


def test_several_images_and_turns_keep_their_places(folder: Path) -> None:
    rows = [
        {
            "image": ["one.png", "two.png"],
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "compare <image>\nwith\n<image>"},
                {"from": "gpt", "value": "alike"},
                {"from": "human", "value": "sure?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
    ]
    sample = opened(jsonl(folder / "set.jsonl", rows))[0]
    assert sample.id == "set-0"
    assert described(sample) == [
        ("system", ["be brief"]),
        ("user", ["compare ", "[one.png]", "with", "[two.png]"]),
        ("assistant", ["alike"]),
        ("user", ["sure?"]),
        ("assistant", ["yes"]),
    ]
    assert sample.answers == ("yes",)


def test_cambrian_text_only_rows_and_system_prompts(folder: Path) -> None:
    rows = [
        {"id": "t", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"id": "i", "image": "one.png", "system_prompt": "short", "conversations": CONVERSATION},
    ]
    source = opened(jsonl(folder / "c.jsonl", rows), format="cambrian")
    assert described(source[0]) == [("user", ["hi"]), ("assistant", ["ho"])]
    assert described(source[1]) == [("system", ["short"]), *ASKED]


def test_qa_accepted_answers_choices_numbers_and_options(folder: Path) -> None:
    rows = [
        {
            "id": "a",
            "question": "pick",
            "answer": ["Two", "2"],
            "choices": ["Two", 3],
            "category": "count",
            "cluster": "s1",
            "unit": "cells",
        },
        {"id": "b", "question": "asked only", "image": ["one.png", "two.png"]},
        {"id": "c", "question": "n?", "answer": 4},
    ]
    path = jsonl(folder / "q.jsonl", rows)
    source = opened(path)
    assert source[0].answers == ("Two", "2")
    assert source[0].answer == "Two"
    assert source[0].choices == ("Two", "3")
    assert (source[0].category, source[0].cluster, source[0].metadata) == ("count", "s1", {"unit": "cells"})
    assert described(source[1]) == [("user", ["[one.png]", "[two.png]", "asked only"])]
    assert source[2].answer == "4"
    asked = opened(path, options={"prompt": "{question} ({choices})", "answer_case": "upper"})[0]
    assert (asked.question, asked.answer) == ("pick (Two, 3)", "TWO")


@pytest.mark.parametrize("options", [{"promt": "x"}, {"prompt": "{missing}"}, {"answer_case": "title"}])
def test_wrong_reader_options_are_usage_errors(folder: Path, options: dict) -> None:
    path = jsonl(folder / "q.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(UsageError, match="option"):
        opened(path, options=options)


def test_images_folder_and_split(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "labels"
    elsewhere.mkdir()
    jsonl(elsewhere / "val.jsonl", [{"id": "v", "image": "one.png", "question": "q", "answer": "a"}])
    source = opened(elsewhere, split="val", images=str(folder))
    assert source[0].images[0].source == str(folder / "one.png")
    with pytest.raises(DataError, match="found the splits val"):
        opened(elsewhere, split="train")


def test_parquet_with_images_as_feature_bytes_and_messages(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {
            "pic": [{"bytes": (folder / "one.png").read_bytes()}] * 2,
            "query": ["q0", "q1"],
            "label": ["a0", "a1"],
            "question_id": [5, 6],
        },
        features=datasets.Features(
            {
                "pic": datasets.Image(),
                "query": datasets.Value("string"),
                "label": datasets.Value("string"),
                "question_id": datasets.Value("int64"),
            }
        ),
    )
    (folder / "p").mkdir()
    table.to_parquet(folder / "p" / "train-0.parquet")
    sample = opened(folder / "p", options={"image": "pic"})[1]
    assert (sample.id, sample.question, sample.answer) == ("6", "q1", "a1")
    assert isinstance(sample.images[0].source, bytes)
    copied = pickle.loads(pickle.dumps(opened(folder / "p", options={"image": "pic"})))
    assert copied[1] == sample
    with pytest.raises(UsageError, match="no column 'picture'"):
        opened(folder / "p", options={"image": "picture"})

    table = datasets.Dataset.from_dict(
        {
            "images": [[{"bytes": (folder / "one.png").read_bytes(), "path": None}]],
            "messages": [[{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}]],
        }
    )
    table.save_to_disk(str(folder / "saved"))
    assert described(opened(folder / "saved")[0])[1] == ("assistant", ["red"])
    assert len(opened(folder / "saved")[0].images) == 1


def test_text_documents_as_samples(folder: Path) -> None:
    (folder / "notes.txt").write_text("first line\n\nsecond\n")
    source = opened(folder / "notes.txt", options={"document_characters": 5})
    assert [source[index].turns[0].text for index in range(source.length or 0)] == ["first line", "second"]
    assert source[0].turns[0].role == "document"
    assert opened(folder / "*.txt", format="text").length == 1
    with pytest.raises(UsageError, match="options"):
        opened(folder / "notes.txt", options={"documents": 5})


def test_cluster_part_and_limit(folder: Path) -> None:
    rows = [{"id": f"line-{k // 4}-{k % 4}", "question": "q", "answer": str(k)} for k in range(200)]
    path = jsonl(folder / "lines.jsonl", rows)
    whole = opened(path, cluster=r"line-(\d+)-")
    assert whole[7].cluster == "1"
    sides = {side: opened(path, cluster=r"line-(\d+)-", part={"share": 0.3, "side": side}) for side in ("train", "dev")}
    ids = {side: {source[i].id for i in range(source.length or 0)} for side, source in sides.items()}
    assert ids["train"] | ids["dev"] == {row["id"] for row in rows}
    clusters = {side: {name.split("-")[1] for name in names} for side, names in ids.items()}
    assert not clusters["train"] & clusters["dev"]
    assert 0.1 < len(ids["dev"]) / 200 < 0.5
    assert opened(path, limit=3).length == 3
    with pytest.raises(DataError, match="does not match cluster"):
        opened(path, cluster=r"receipt-(\d+)")[0]
    with pytest.raises(UsageError, match="has none"):
        opened(path, part={"share": 0.3, "side": "dev"})


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12),
    gaps=st.lists(st.sampled_from(["", "\n", "  \n", "\r\n"]), min_size=12, max_size=12),
    closed=st.booleans(),
)
def test_jsonl_rows_are_found_by_offset(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], gaps: list[str], closed: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [gap + json.dumps({"text": text}, ensure_ascii=False) for text, gap in zip(texts, gaps, strict=False)]
    path.write_bytes(("\n".join(lines) + ("\n" if closed else "")).encode())
    rows = JsonlRows(path)
    assert [rows[index]["text"] for index in reversed(range(len(rows)))] == texts[::-1]
    copied = pickle.loads(pickle.dumps(rows))
    assert copied[len(texts) - 1] == rows[len(texts) - 1]


def test_rows_survive_a_fork(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"k": k} for k in range(50)])
    rows = JsonlRows(path)
    assert rows[0] == {"k": 0}
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        good = all(rows[k]["k"] == k for k in range(50))
        os.write(write, b"1" if good else b"0")
        os._exit(0)
    assert all(rows[k]["k"] == k for k in reversed(range(50)))
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)


def test_blind_takes_images_and_nothing_else(folder: Path) -> None:
    sample = Sample.qa("a", [ImagePart("x.png")], "what?", "red", category="c", choices=("red", "blue"))
    blind = sample.without_images()
    assert blind.images == ()
    assert (blind.question, blind.answer, blind.category, blind.choices) == ("what?", "red", "c", ("red", "blue"))


def test_a_source_may_keep_images_of_some_aspects_only(tmp_path: Path) -> None:
    rows = []
    for number, (width, height) in enumerate([(10, 10), (40, 10), (90, 10)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "question": "q", "answer": "a"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(source=str(tmp_path), aspect=(2, 5)))
    assert [source[index].id for index in range(source.length or 0)] == ["1"]
    with pytest.raises(DataError, match="no sample"):
        open_source(SourceConfig(source=str(tmp_path), aspect=(20, 30)))
    with pytest.raises(UsageError, match="swap the two"):
        open_source(SourceConfig(source=str(tmp_path), aspect=(3, 2)))
    with pytest.raises(UsageError, match="endless"):
        open_source(SourceConfig(source="generated:characters", aspect=(2, 3)))


def test_a_fixed_prompt_takes_the_place_of_the_question(folder: Path) -> None:
    path = jsonl(folder / "q.jsonl", [{"image": "one.png", "question": "what", "answer": "b"}])
    sample = open_source(SourceConfig(source=str(path), options={"prompt": "photo:<image>"}))[0]
    assert sample.question == "photo:"
    assert len(sample.images) == 1
