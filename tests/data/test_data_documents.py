"""Data files of unknown origin: byte order marks, roots, surrogates, digits, hostile tar headers."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unclipped.core.errors import DataError, UnclippedError
from unclipped.data import shards
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.data.sample import Sample
from unclipped.data.sources import open_source

ROW = {"image": "a.png", "question": "colour?", "answer": "red"}
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def answers(path: Path, **fields: Any) -> list[str]:
    source = open_source(SourceConfig(source=str(path), **fields))
    return [source[index].answer for index in range(source.length or 0)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", BOM + json.dumps([ROW]).encode()),
        ("rows.jsonl", BOM + json.dumps(ROW).encode() + b"\n" + json.dumps(ROW).encode()),
        ("mark_alone.jsonl", BOM + b"\n" + json.dumps(ROW).encode()),
        ("data.json", json.dumps({"data": [ROW]}).encode()),
        ("data_in_lines.json", json.dumps({"version": 1, "data": [ROW]}, indent=1).encode()),
        ("annotations.json", BOM + json.dumps({"annotations": [ROW]}, indent=4).encode()),
        ("array_in_lines.json", json.dumps([ROW], indent=2).encode()),
        ("blank_first.jsonl", b"\n \n" + json.dumps(ROW).encode()),
    ],
)
def test_byte_order_marks_and_roots_that_hold_rows_are_read(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert set(answers(folder / name)) == {"red"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(ROW, indent=1), "one JSON object over several lines, with the fields answer, image, question"),
        (json.dumps(ROW, indent=1) + "\n" + json.dumps(ROW, indent=1), "one object on each line"),
        (json.dumps({"images": [], "info": {}}, indent=1), "with the fields images, info"),
        ("3", "JSON object"),
        ('{"question": 1', "not valid JSON"),
        (json.dumps(ROW) + "\n" + "[" * 5000, "line 2"),
        ('{"question": ' + "7" * 5000 + "}", "5,000 digits"),
        ('{"question": "a", "question": "b", "answer": "c"}', "'question' occurs twice"),
    ],
)
def test_other_json_roots_are_refused_with_what_was_found(folder: Path, content: str, said: str) -> None:
    (folder / "rows.json").write_text(content)
    with pytest.raises(DataError) as caught:
        answers(folder / "rows.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_byte_order_marks_of_text_are_no_text(folder: Path) -> None:
    (folder / "a.txt").write_bytes(BOM + b"one")
    (folder / "b.jsonl").write_bytes(BOM + b'{"text": "two"}')
    for name, text in (("a.txt", "one"), ("b.jsonl", "two")):
        source = open_source(SourceConfig(source=str(folder / name), format="text"))
        assert source[0].turns[0].text == text


@pytest.mark.parametrize("place", ["question", "answer", "id", "category", "cluster"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_a_surrogate_pair_is_a_bad_sample_in_any_field(folder: Path, place: str, name: str) -> None:
    bad = {**ROW, place: "cut emoji \ud83d"}
    rows = [ROW, bad, ROW]
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    source = open_source(SourceConfig(source=str(folder / name)))
    assert source[0].answer == source[2].answer == "red"
    with pytest.raises(DataError, match=r"(line 2|item 1).*surrogate pair"):
        source[1]
    mixture = Mixture(DataConfig.model_validate({"sources": [{"source": str(folder / name)}], "on_bad_sample": "skip"}))
    assert {sample.answer for index in range(6) if isinstance(sample := mixture.sample(index), Sample)} == {"red"}
    assert mixture.skipped


@pytest.mark.parametrize(
    "fields",
    [{"question": "\ud83d"}, {"answer": "\udcff"}, {"id": "\udc80"}, {"category": "\ud800"}, {"choices": ["\ud800"]}],
)
def test_samples_made_in_python_hold_no_half_pairs(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="surrogate pair"):
        Sample.qa(**{"id": "s", "images": [], "question": "q", "answer": "a"} | fields)


def test_devices_and_pipes_are_no_data(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    os.symlink("/dev/zero", folder / "zero.jsonl")
    os.symlink("/dev/zero", folder / "zero.tar")
    for name in ("pipe.jsonl", "zero.jsonl", "zero.tar"):
        with pytest.raises(DataError):
            answers(folder / name)
    with pytest.raises(DataError):
        answers(Path("/dev/zero"))


def member(name: str, content: bytes, **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    kind = tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT
    return info.tobuf(kind) + content + bytes(-len(content) % 512)


def pair(key: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return member(f"{key}.png", stream.getvalue()) + member(f"{key}.txt", key.encode())


HOSTILE = {
    "size beyond the file": member("b.png", b"", size=8 << 30),
    "size beyond any file": member("b.png", b"", pax_headers={"size": "9" * 30}),
    "negative size": member("b.png", b"").replace(b"0" * 11 + b"\0", b"\xff" * 12, 1),
    "header of a size beyond the file": member("././@PaxHeader", b"12 path=b.png", size=1 << 40, type=b"x"),
    "long name of a size beyond the file": member("././@LongLink", b"b.png", size=1 << 40, type=b"L"),
    "sparse map in the headers": member(
        "b.png", b"x", pax_headers={"GNU.sparse.map": "0,1," * 50 + "0,99999999999999", "GNU.sparse.size": "1" * 15}
    ),
    "sparse map in the data": member(
        "b.png", b"1\n0\n1\n" + bytes(506) + b"x", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    ),
    "sparse map cut": member("b.png", b"99999999\n", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "sparse map of words": member("b.png", b"x", pax_headers={"GNU.sparse.map": "a,b"}),
    "key of a megabyte": member("k" * (1 << 20) + ".png", b"x"),
    "headers that follow headers": member("././@LongLink", b"b.png", type=b"L") * 2000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tar_headers_are_counted_and_named(folder: Path, name: str) -> None:
    path = folder / "x.tar"
    path.write_bytes(pair("a") + HOSTILE[name] + bytes(1024))
    tracemalloc.start()
    source = open_source(SourceConfig(source=str(path)))
    assert source[0].answer == "a"
    with pytest.raises(DataError, match=r"shard .*x\.tar"):
        [source[index] for index in range(1, source.length or 0)]
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_samples_after_a_damaged_header_are_read(folder: Path) -> None:
    path = folder / "x.tar"
    path.write_bytes(pair("a") + HOSTILE["negative size"] + pair("c") + bytes(1024))
    source = open_source(SourceConfig(source=str(path)))
    found = []
    for index in range(source.length or 0):
        try:
            found.append(source[index].answer)
        except DataError as error:
            found.append(type(error).__name__)
    assert found[0] == "a"
    assert found[-1] == "c"
    assert "DataError" in found


def test_a_shard_of_damage_alone_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_DAMAGE", 5)
    path = folder / "x.tar"
    path.write_bytes(pair("a") + HOSTILE["long name of a size beyond the file"] * 20 + bytes(1024))
    source = open_source(SourceConfig(source=str(path)))
    with pytest.raises(DataError, match="more than 5 damaged headers"):
        source[(source.length or 0) - 1]


def test_names_with_dots_in_shards_name_the_webdataset_rule(folder: Path) -> None:
    path = folder / "x.tar"
    image = (folder / "a.png").read_bytes()
    path.write_bytes(member("22.5_a.png", image) + member("22.7_b.png", image) + bytes(1024))
    source = open_source(SourceConfig(source=str(path), options={"caption": "none"}))
    with pytest.raises(DataError, match=r"webdataset a key ends at the first dot .* '22\.|webdataset .*22\.A\.jpg"):
        source[0]
    path.write_bytes(pair("a") + member("a.seg.png", image) + bytes(1024))  # more members are as webdataset has them
    os.utime(path, (1, 1))
    assert answers(path) == ["a"]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_shards_end_in_samples_or_errors_of_ours(folder: Path, data: st.DataObject) -> None:
    content = bytearray(pair("a") + pair("b") + member("c.json", b"{}") + bytes(1024))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / f"{data.draw(st.integers(0, 1 << 60))}.tar"
    path.write_bytes(bytes(content))
    try:
        source = open_source(SourceConfig(source=str(path)))
        for index in range(source.length or 0):
            try:
                source[index]
            except UnclippedError as error:
                line = str(error)
                assert "\n" not in line
    except UnclippedError as error:
        assert "\n" not in str(error)  # noqa: PT017
