"""Image–text pairs: rows with a caption are told by content, and samples that are no pair are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from unclipped.core.errors import DataError
from unclipped.data.config import SourceConfig
from unclipped.data.pairs import pair_of
from unclipped.data.sample import ImagePart, Sample, TextPart, Turn
from unclipped.data.sources import Source, open_source

IMAGE = ImagePart("one.png")


def opened(folder: Path, rows: list[dict]) -> Source:
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceConfig(source=str(file)))


def turns(*parts: tuple) -> tuple[Turn, ...]:
    return tuple(Turn(role, tuple(items)) for role, *items in parts)


@pytest.mark.parametrize("field", ["caption", "text"])
def test_caption_rows_are_told_by_content(tmp_path: Path, field: str) -> None:
    source = opened(tmp_path, [{"id": "a", "image": "one.png", field: " a red boat\n", "category": "boats"}])
    sample = source[0]
    image, caption = pair_of(sample)
    assert (Path(image.label).name, caption) == ("one.png", "a red boat")
    assert (sample.id, sample.category, sample.answers, sample.question) == ("a", "boats", ("a red boat",), "")


def test_the_format_can_be_named(tmp_path: Path) -> None:
    opened(tmp_path, [{"image": "one.png", "caption": "a", "question": "what?", "answer": "b"}])
    source = open_source(SourceConfig(source=str(tmp_path / "rows.jsonl"), format="pairs"))
    assert pair_of(source[0])[1] == "a"


def test_an_instruction_beside_the_image_is_not_part_of_the_pair() -> None:
    sample = Sample.qa("a", [IMAGE], "Describe the image.", " a red boat ")
    assert pair_of(sample) == (IMAGE, "a red boat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "one.png", "caption": " "}, "line 2, sample rows-1: field 'caption': the caption is empty"),
        ({"image": "one.png"}, "field 'caption': missing, and so is 'text'; found the fields image"),
        ({"caption": "x"}, "field 'image': missing"),
        ({"image": ["one.png", "one.png"], "caption": "x"}, "expected exactly one image, found 2"),
        ({"image": "", "caption": "x"}, "expected exactly one image, found 0"),
        ({"image": "gone.png", "caption": "x"}, "no image file"),
        ({"image": "one.png", "caption": ["x"]}, "expected text, found list"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict, message: str) -> None:
    source = opened(tmp_path, [{"image": "one.png", "caption": "a"}, row])
    with pytest.raises(DataError, match=message):
        source[1]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (turns(("user", TextPart("q")), ("assistant", TextPart("a"))), "sample s: .*exactly one image.*found 0"),
        (turns(("user", IMAGE, IMAGE), ("assistant", TextPart("a"))), "found 2 there"),
        (turns(("user", TextPart("q")), ("assistant", IMAGE, TextPart("a"))), "found 0 there and 1 in all"),
        (turns(("user", IMAGE)), "sample s: .*exactly one assistant turn.*found 0"),
        (turns(("user", IMAGE), *[("assistant", TextPart("a"))] * 2), "exactly one assistant turn.*found 2"),
        (turns(("user", IMAGE), ("assistant", TextPart(" "))), "sample s: the caption is empty"),
    ],
)
def test_samples_that_are_no_pair(made: tuple[Turn, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair_of(Sample(id="s", turns=made))
