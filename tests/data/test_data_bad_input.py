"""Bad data: each row is one mistake, and the one line that a user gets for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from support.tiny_models import tiny_tokenizer
from unclipped.core.errors import DataError, UnclippedError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.sources import open_source
from unclipped.encoding.examples import encode_sample

GOOD = {"id": "good", "image": "one.png", "question": "q", "answer": "a"}
TALK = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def talk(**fields: Any) -> dict[str, Any]:
    return {"id": "s1", "conversations": TALK, **fields}


CASES: dict[str, tuple[str, list[str]]] = {
    "empty file": ("", ["empty"]),
    "blank lines only": ("\n  \n\n", ["empty"]),
    "cut in the middle of a line": (lines(GOOD, GOOD)[:-20], ["line 2", "not valid JSON", "cut"]),
    "damaged line inside": (lines(GOOD, '{"id": ', GOOD), ["line 2", "not valid JSON"]),
    "not an object": (lines(GOOD, "[1, 2]"), ["line 2", "JSON object", "an array"]),
    "no known fields": (lines({"id": "s1", "picture": 1}), ["cannot tell the format", "id, picture"]),
    "missing image": (lines({**GOOD, "image": "no.png"}), ["line 1", "sample good", "'image'", "no.png"]),
    "image of a wrong kind": (lines({**GOOD, "image": 3}), ["sample good", "'image'", "int"]),
    "no question": (lines(GOOD, {"id": "s2", "answer": "a"}), ["line 2", "sample s2", "'question'", "missing"]),
    "answer of a wrong kind": (lines({**GOOD, "answer": {"a": 1}}), ["sample good", "'answer'", "dict"]),
    "no accepted answer": (lines({**GOOD, "answer": []}), ["sample good", "'answer'", "empty"]),
    "choices of a wrong kind": (lines({**GOOD, "choices": "ab"}), ["sample good", "'choices'", "list"]),
    "image without placeholder": (lines(talk(image="one.png")), ["sample s1", "0 <image>", "1 images"]),
    "placeholder without image": (
        lines(talk(conversations=[{"from": "human", "value": "<image><image>"}, TALK[1]], image="one.png")),
        ["sample s1", "2 <image>", "1 images"],
    ),
    "no turns": (lines(talk(conversations=[])), ["sample s1", "'conversations'", "list of turns"]),
    "unknown role": (lines(talk(conversations=[{"from": "judge", "value": "x"}])), ["sample s1", "'judge'", "human"]),
    "tool turn": (lines(talk(conversations=[*TALK, {"from": "tool", "value": "x"}])), ["sample s1", "tool turns"]),
    "tool calls": (
        lines({"id": "s1", "messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}),
        ["sample s1", "tool turns"],
    ),
    "unknown part": (
        lines({"id": "s1", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
        ["sample s1", "type text or image"],
    ),
    "no supervised token": (lines({"id": "s1", "question": "q"}), ["sample s1", "no supervised token"]),
    "empty answer": (lines({"id": "s1", "question": "q", "answer": " "}), ["sample s1", "no supervised token"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_rows_name_file_sample_and_remedy(tmp_path: Path, case: str) -> None:
    content, expected = CASES[case]
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    path = tmp_path / "train.jsonl"
    path.write_text(content)

    def read_all() -> None:
        source = open_source(SourceConfig(source=str(path)))
        for index in range(source.length or 0):
            sample = source[index]
            encode_sample(sample.without_images(), tiny_tokenizer())

    with pytest.raises(DataError) as caught:
        read_all()
    message = str(caught.value)
    assert "\n" not in message
    for piece in expected:
        assert piece in message, message


def write(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "nothing", "no such file"),
        (lambda folder: folder, "holds no data file"),
        (write("a.json", b"[]"), "empty"),
        (write("a.json", b'[{"question": "q", "ans'), "not valid JSON"),
        (write("a.json", b'[{"question": '), "cut"),
        (write("a.jsonl", b'{"question": "\xff"}'), "UTF-8"),
        (write("a.parquet", b"PAR1 no"), "cannot be read"),
        (write("a.txt.gz", b"no gzip"), "cannot be read"),
        (write("a.txt", b"\xff\xfe\xfa"), "UTF-8"),
        (write("a.txt", b"  \n \n"), "no sample"),
    ],
)
def test_bad_files_name_themselves(tmp_path: Path, make: Callable[[Path], Path], expected: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        open_source(SourceConfig(source=str(path)))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"source": ""},
        {"source": "a", "format": "csv"},
        {"source": "a", "weight": 0},
        {"source": "a", "cluster": "no group"},
        {"source": "a", "cluster": "(a"},
        {"source": "a", "part": {"share": 1.5, "side": "dev"}},
        {"source": "a", "shuffle": True},
        {"source": "a", "augment": {"steps": [{"kind": "permute_panels", "panels": [[0, 0.5]], "names": ["left"]}]}},
        {"source": "a", "augment": {"steps": [{"kind": "rotate"}]}},
    ],
)
def test_wrong_source_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourceConfig(**fields)


def test_a_mixture_needs_a_source() -> None:
    with pytest.raises(ValidationError):
        DataConfig(sources=())


def test_unknown_generated_task_is_named() -> None:
    with pytest.raises(UnclippedError, match="chracters"):
        open_source(SourceConfig(source="generated:chracters"))


def test_a_path_may_name_an_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "a", "question": "q", "answer": "b"}\n')
    monkeypatch.setenv("UNCLIPPED_TEST_FOLDER", str(tmp_path))
    assert open_source(SourceConfig(source="$UNCLIPPED_TEST_FOLDER"))[0].answer == "b"
    monkeypatch.delenv("UNCLIPPED_TEST_FOLDER")
    with pytest.raises(UsageError, match="UNCLIPPED_TEST_FOLDER is not set"):
        open_source(SourceConfig(source="$UNCLIPPED_TEST_FOLDER"))
