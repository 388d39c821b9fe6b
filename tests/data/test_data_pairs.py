"""Image–text pairs: rows with a caption are told by content, and samples that are no pair are refused by name."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unclipped.core.errors import DataError, UsageError
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


def table(folder: Path, captions: str = "caption", images: str = "image", **columns: list) -> Any:
    """A table of two images and their captions, images as encoded bytes."""
    datasets = pytest.importorskip("datasets")
    encoded = BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, format="PNG")
    pictures = [{"bytes": encoded.getvalue(), "path": None}] * 2
    made = datasets.Dataset.from_dict({images: pictures, captions: ["a red boat ", "a tree"], **columns})
    return made.cast_column(images, datasets.Image())


@pytest.mark.parametrize("captions", ["caption", "text", "alt_text"])
def test_caption_columns_of_parquet_are_pairs(tmp_path: Path, captions: str) -> None:
    table(tmp_path, captions, id=["a", "b"], category=["boats", "trees"]).to_parquet(str(tmp_path / "train.parquet"))
    source = open_source(SourceConfig(source=str(tmp_path)))
    sample = source[0]
    image, caption = pair_of(sample)
    assert caption == "a red boat"
    assert isinstance(image.source, bytes)
    assert (sample.id, sample.category, sample.question) == ("a", "boats", "")


def test_caption_columns_of_arrow_and_of_other_names(tmp_path: Path) -> None:
    table(tmp_path, "words", "pic").save_to_disk(str(tmp_path / "saved"))
    options = {"image": "pic", "caption": "words"}
    assert pair_of(open_source(SourceConfig(source=str(tmp_path / "saved"), options=options))[1])[1] == "a tree"
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert pair_of(open_source(SourceConfig(source=str(file), options=options))[0])[1] == "a red boat"


def test_questions_win_unless_captions_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    table(tmp_path, "text", question=["q", "r"], answer=["a", "b"]).to_parquet(str(file))
    sample = open_source(SourceConfig(source=str(file)))[0]
    assert (sample.question, sample.answer, sample.metadata) == ("q", "a", {})
    assert pair_of(open_source(SourceConfig(source=str(file), options={"caption": "text"}))[0])[1] == "a red boat"


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        (
            ("note", "pic"),
            {},
            DataError,
            "no image with a caption or label, among pic, note; .*{image: COLUMN, caption: COLUMN}",
        ),
        (("caption", "pic"), {"caption": "caption"}, UsageError, "a caption needs an image"),
        (
            ("caption", "image"),
            {"caption": "words"},
            UsageError,
            "option caption: no column 'words'; found image, caption",
        ),
        (("caption", "image"), {"prompt": "what?"}, UsageError, "option prompt: pairs have no question"),
    ],
)
def test_bad_columns(tmp_path: Path, columns: tuple[str, str], options: dict, error: type, message: str) -> None:
    table(tmp_path, *columns).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(error, match=message):
        open_source(SourceConfig(source=str(tmp_path), options=options))


def test_an_unknown_format_names_pairs_and_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image and caption, or text.* qa, pairs, text; a folder of images"):
        opened(tmp_path, [{"picture": "one.png"}])
