"""Programs that users bring, in recipes and with models: each ends within its limits, with one line that names it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import tiny_tokenizer
from unclipped.audit.features import image_digest
from unclipped.core import bounded
from unclipped.core.errors import CheckpointError, DataError, ImageError, UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.sample import ImagePart, Sample, TextPart, Turn
from unclipped.data.sources import open_source
from unclipped.encoding.chat import encoder_of
from unclipped.images.decode import load_image, read_header
from unclipped.models.chat import knows_images
from unclipped.models.language import end_of_turn_ids

LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
ALLOCATES = "{{ 'x' * 8000000000 }}"
LONG = "{{ 'x' * 4000000 }}"
SAMPLE = Sample("s1", (Turn("user", (TextPart("q"),)), Turn("assistant", (TextPart("a"),))))


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bounded.bounded.__init__.__kwdefaults__, "seconds", 0.2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(compact=False)


@pytest.mark.parametrize(("template", "says"), [(LOOPS, "0.2 s"), (ALLOCATES, "1 GB"), (LONG, "4,000,000 characters")])
def test_a_chat_template_without_bound_is_refused_wherever_it_is_rendered(
    tokenizer: Any, template: str, says: str
) -> None:
    tokenizer.chat_template = template
    for render in (
        lambda: knows_images(template, "<image>", "FOLDER"),
        lambda: end_of_turn_ids(tokenizer),
        lambda: encoder_of(tokenizer).tokens(SAMPLE, []),
    ):
        with pytest.raises(CheckpointError, match=f"chat template of .*{says}.*limit"):
            render()


def rows(folder: Path, identity: str = "s1") -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"id": identity, "question": "q", "answer": "a"}) + "\n")
    return str(path)


def test_a_cluster_expression_that_backtracks_is_refused(tmp_path: Path) -> None:
    part = {"share": 0.5, "side": "train"}
    config = SourceConfig(source=rows(tmp_path, "a" * 60 + "b"), cluster="^(?:a+)+(c)", part=part)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"sample aaa.*cluster '\^\(\?:a\+\)\+\(c\)'.*0\.2 s"):
        open_source(config)


@pytest.mark.parametrize("expression", ["(" * 400 + ")" * 400, "(" * 2000, "(a" * 2, "x" * 100_000])
def test_a_cluster_expression_that_cannot_be_compiled_is_one_line(expression: str) -> None:
    with pytest.raises(ValueError, match="cluster"):
        SourceConfig(source="x", cluster=expression)


@pytest.mark.parametrize("prompt", ["{question:>999999999}", "{question!r:>9}", "{question.__doc__}", "x" * 20_000, 7])
def test_a_prompt_that_is_more_than_plain_fields_is_refused(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(UsageError, match="option prompt"):
        open_source(SourceConfig(source=rows(tmp_path), options={"prompt": prompt}))


@pytest.mark.parametrize(
    "pattern",
    ["{0..999999999999}.tar", "{0..999}{0..999}.tar", "{a,b}" * 40 + ".tar", "{0..200}" + "{a}" * 800 + ".tar"],
)  # fmt: skip
def test_braces_that_name_too_many_shards_are_counted_before_they_are_expanded(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unclipped.data.readers.tar.MAX_NAMES", 10_000)
    with pytest.raises(UsageError, match="the limit"):
        open_source(SourceConfig(source=pattern, format="tar"))


def test_nested_braces_and_wide_numbers_are_filled_in() -> None:
    from unclipped.data.readers.tar import _expanded

    assert _expanded("d-{008..010}-{a,b}") == ["d-008-a", "d-008-b", "d-009-a", "d-009-b", "d-010-a", "d-010-b"]
    assert _expanded("{x{0..1},y}") == ["x0", "y", "x1", "y"]


@pytest.mark.parametrize("kind", ["auto", "qa", "llava", "parquet", "tar", "text"])
def test_a_device_or_a_pipe_is_no_source(tmp_path: Path, kind: Any) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("/dev/zero", str(tmp_path / "pipe.jsonl")):
        with pytest.raises(DataError, match=r"device or a pipe|no such file|missing"):
            open_source(SourceConfig(source=name, format=kind))


def test_a_device_or_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("/dev/zero", str(tmp_path / "pipe.png")):
        part = ImagePart(name, name)
        for read in (lambda part: load_image(part.source), lambda part: read_header(part.source), image_digest):
            with pytest.raises(ImageError, match="a device or a pipe"):
                read(part)
