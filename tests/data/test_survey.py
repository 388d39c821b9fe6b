"""What a survey counts is what was put there, and a filter's report follows from the scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclipped.data.config import SourceConfig, TextRichFilter
from unclipped.data.sources import open_source
from unclipped.data.survey import COLUMNS, ON_SHEET, TILE, Survey, filter_report, sheet, spread
from unclipped.data.text_rich.filtering import NO_IMAGE


def surveyed(folder: Path, rows: list[dict] | None = None) -> dict:
    if rows is not None:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(source=str(folder)))
    survey = Survey()
    for index in range(source.length or 0):
        survey.add(lambda index=index: source[index])
    return survey.to_dict()


def image(path: Path, width: int, height: int, value: int = 0, mode: str = "RGB") -> None:
    Image.new(mode, (width, height), value if mode == "L" else (value, 0, 0)).save(path)


def test_images_texts_and_categories_are_counted(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 10, 20)
    image(tmp_path / "b.png", 40, 20)
    image(tmp_path / "c.png", 30, 30, 7, mode="L")
    found = surveyed(
        tmp_path,
        [
            {"id": "1", "image": "a.png", "question": "what", "answer": "abc", "category": "x"},
            {"id": "2", "image": "a.png", "question": "who", "answer": "a", "category": "x"},
            {"id": "3", "image": "b.png", "question": "how much", "answer": "abcde", "category": "y"},
            {"id": "4", "image": "c.png", "question": "why", "answer": "ab"},
            {"id": "5", "question": "two and two?", "answer": "4"},
        ],
    )
    images = found["images"]
    assert (found["samples"], found["samples_without_image"]) == (5, 1)
    assert (images["named"], images["different"]) == (4, 3)
    assert images["width"] == {"count": 3, "min": 10, "median": 30, "max": 40}
    assert images["height"] == {"count": 3, "min": 20, "median": 20, "max": 30}
    assert images["aspect"] == {"count": 3, "min": 0.5, "median": 1, "max": 2}
    assert images["channels"] == {"RGB": 2, "L": 1}
    assert found["answer_characters"] == {"count": 5, "min": 1, "median": 2, "max": 5}
    assert found["question_characters"] == {"count": 5, "min": 3, "median": 4, "max": 12}
    assert found["categories"] == {"different": 2, "most_common": {"x": 2, "y": 1}}
    assert found["unreadable"] == {"count": 0, "named": []}
    assert found["document_characters"] is None


def test_duplicates_and_what_cannot_be_read_are_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 8, 8)
    image(tmp_path / "b.bmp", 8, 8)  # the same pixels in another file
    image(tmp_path / "c.png", 8, 8, 1)
    (tmp_path / "d.png").write_bytes(b"\x89PNG cut")
    found = surveyed(tmp_path)
    assert found["images"]["same_pixels_under_another_name"] == 1
    (pair,) = found["images"]["duplicates"]
    assert "b.bmp = " in pair
    assert "a.png" in pair
    assert found["unreadable"]["count"] == 1
    assert "d.png" in found["unreadable"]["named"][0]
    assert found["images"]["width"]["count"] == 3


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 8, 8)
    good = {"image": "a.png", "caption": "a boat"}
    found = surveyed(tmp_path, [good, {"image": "a.png"}, {"image": "gone.png", "caption": "x"}, good])
    assert found["samples"] == 4
    assert found["unreadable"]["count"] == 2
    assert "line 2" in found["unreadable"]["named"][0]
    assert "gone.png" in found["unreadable"]["named"][1]


def test_spread() -> None:
    assert spread([]) is None
    assert spread([3, 1, 2, 10]) == {"count": 4, "min": 1, "median": 2.5, "max": 10}


def test_the_report_of_a_filter() -> None:
    scores = np.array([0.95, 0.2, np.nan, 0.5, NO_IMAGE, 1.0, 0.0], dtype=np.float32)
    report, kept, rejected = filter_report(scores, TextRichFilter(threshold=0.5))
    assert kept.tolist() == [5, 0, 3]
    assert rejected.tolist() == [1, 6]
    assert (report["kept"], report["images_scored"], report["share_kept"]) == (3, 5, pytest.approx(0.6))
    assert (report["cannot_be_read"], report["without_image"]) == (1, 1)
    assert (report["least_score_kept"], report["highest_score"]) == (0.5, 1.0)
    histogram = report["score_histogram"]
    assert sum(histogram.values()) == 5
    assert (histogram["0.9 to 1.0"], histogram["0.0 to 0.1"], histogram["0.5 to 0.6"]) == (2, 1, 1)
    json.dumps(report)
    nothing, none_kept, _ = filter_report(scores, TextRichFilter(share=0.01))
    assert (nothing["kept"], len(none_kept), nothing["least_score_kept"]) == (0, 0, None)


def test_a_sheet_shows_a_part_of_many_and_shrinks_them(tmp_path: Path) -> None:
    for index in range(40):
        image(tmp_path / f"{index:02d}.png", 400, 100, index)
    (tmp_path / "05.png").write_bytes(b"\x89PNG cut")
    source = open_source(SourceConfig(source=str(tmp_path)))
    seen: list[int] = []
    picture = sheet(source, list(range(40)), lambda index, _: seen.append(index) or "text")  # type: ignore[func-returns-value]
    assert picture is not None
    assert len(seen) in (ON_SHEET - 1, ON_SHEET)
    assert seen[0] == 0
    assert seen[-1] == 39
    assert picture.width <= COLUMNS * (TILE + 8) + 8
    assert sheet(source, [], lambda index, _: "") is None
