"""Documents of unknown origin: refused in one line that names the place, or read as the standard readers do."""

import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unclipped.core import documents
from unclipped.core.documents import parse_json, parse_yaml, read_json, read_jsonl, read_yaml
from unclipped.core.errors import DataError, UsageError, guarded

BAD_JSON = {
    "cut": ('{"a": [1, 2', "not valid JSON"),
    "double key": ('{"a": 1, "a": 2}', "'a' occurs twice"),
    "double key below": ('{"b": [{"a": 1, "a": 2}]}', "'a' occurs twice"),
    "digits": ("[" + "9" * 5000 + "]", "5,000 digits"),
    "depth": ("[" * 150 + "]" * 150, "100 levels"),
    "depth beyond the stack": ("[" * 200_000, "100 levels"),
    "half a pair": ('{"a": "x\\ud800"}', "surrogate"),
    "half a pair as key": ('{"\\udfff": 1}', "surrogate"),
    "bytes": (b'{"a": "\xff"}', "not UTF-8"),
    "empty": ("", "not valid JSON"),
}

BAD_YAML = {
    "bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefg", "bcdefgh", strict=True)),
        "100,000 values",
    ),
    "circle": ("a: &a [*a]", "contains it"),
    "depth": ("[" * 5000 + "]" * 5000, "100 levels"),
    "block depth": ("\n".join(" " * i + "a:" for i in range(500)), "100 levels"),
    "double key": ("training: {seed: 1}\ntraining: {seed: 2}", "line 2: the key 'training' occurs twice"),
    "digits": ("seed: " + "9" * 5000, "5,000 digits"),
    "hexadecimal digits": ("seed: 0x" + "f" * 5000, "digits"),
    "date": ("a: 2024-99-99", "not valid YAML"),
    "tag": ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    "float": ("a: !!float x", "not valid YAML"),
    "surrogate": ('a: "\\ud800"', "surrogate"),
    "tab": ("a:\n\t- b", "not valid YAML"),
    "null": ("a: \0", "not valid YAML"),
    "unhashable": ("{[a]: 1}", "not valid YAML"),
    "merge of text": ("<<: a", "not valid YAML"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_one_line(name):
    text, said = BAD_JSON[name]
    with pytest.raises(DataError) as error:
        parse_json(text, "f.json")
    assert said in str(error.value)
    assert str(error.value).startswith("f.json")
    assert "\n" not in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_one_line(name):
    text, said = BAD_YAML[name]
    with pytest.raises(UsageError) as error:
        parse_yaml(text, "recipe f.yaml", error=UsageError)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes("\ufeff".encode() + b'{"a": "\xc3\xa9"}')
    assert read_json(path) == {"a": "é"}
    assert list(read_jsonl(path)) == [(1, {"a": "é"})]
    assert read_yaml(path) == {"a": "é"}


def test_devices_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "absent", "a\0b", "a\ud800b"):
        with pytest.raises(DataError):
            read_json(path)
        with pytest.raises(DataError):
            list(read_jsonl(path))


def test_size_limits_name_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "' + "x" * 100 + '"}\n')
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 50)
    with pytest.raises(DataError, match="line 1: longer than 50 bytes"):
        list(read_jsonl(path))
    with pytest.raises(DataError, match="limit is 60"):
        read_json(path, limit=60)


def test_aliases_and_merges_that_are_small_are_read():
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: *x}", "f") == {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_good_values_are_what_the_standard_readers_give(value):
    assert parse_json(json.dumps(value), "f") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "f") == value
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text, "f") == yaml.safe_load(text)


@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_text_is_read_or_refused_in_one_line(text):
    for parse in (parse_json, parse_yaml):
        try:
            parse(text, "f")
        except DataError as error:
            line = str(error)
        else:
            continue
        assert "\n" not in line


def test_guarded_keeps_the_cause_and_passes_our_own_errors():
    with (
        pytest.raises(DataError, match=r"^x: bad \(boom\)$") as caught,
        guarded(lambda why: DataError(f"x: bad ({why})")),
    ):
        raise RuntimeError("boom\nmore")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(UsageError, match=r"^mine$"), guarded(DataError):
        raise UsageError("mine")


def test_messages_are_one_line_that_every_terminal_prints():
    error = DataError("a\nb \x1b[2J \ud800 é " + "x" * 9000)
    assert str(error).startswith(r"a\nb \x1b[2J \ud800 é xxx")
    assert str(error).endswith("more characters)")
    assert len(str(error)) < 4100
