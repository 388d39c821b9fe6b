"""`unclipped data stats` writes what it prints, and runs read through the filter that it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from text_detector import generated_scene, without_text
from unclipped.cli.app import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `photos`: twelve images, four of them full of text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for index in range(12):
        scene = generated_scene("receipts", "test", 900 + index)
        (scene if index % 3 == 0 else without_text(scene)).paint().save(tmp_path / f"photos/{index:02d}.png")
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_folder_of_images(folder: Path) -> None:
    out = run("data", "stats", "photos", "--output", "out")
    (source,) = json.loads((folder / "out/stats.json").read_text())["sources"]
    assert (source["total"], source["looked_at"]) == (12, 12)
    assert source["images"]["width"] == {"count": 12, "min": 160, "median": 160, "max": 160}
    assert "12; 0 without an image" in out
    assert "160 / 160 / 160 px" in out
    with Image.open(folder / "out/images.png") as picture:
        assert picture.width > 6 * 160
    assert {path.name for path in (folder / "out").iterdir()} == {
        *("stats.json", "images.png", "recipe.yaml", "environment.json", "inputs.json"),
    }


def test_what_a_filter_keeps(folder: Path) -> None:
    out = run("data", "stats", "photos", "--filter", "text_rich", "--output", "out")
    (source,) = json.loads((folder / "out/stats.json").read_text())["sources"]
    assert (source["filter"]["kept"], source["filter"]["images_scored"]) == (4, 12)
    assert sum(source["filter"]["score_histogram"].values()) == 12
    assert "text_rich keeps    4 of 12 (33.3%)" in out
    assert (folder / "out/kept.png").is_file()
    assert (folder / "out/rejected.png").is_file()
    out = run("data", "stats", "photos", "--filter", "text_rich", "--share", "0.1", "--output", "heavy")
    assert "text_rich keeps    1 of 12 (8.3%)" in out
    out = run("data", "stats", "photos", "--filter", "text_rich", "--threshold", "1", "--output", "none")
    assert "a filter that keeps nothing" in out
    assert not (folder / "none/kept.png").exists()


def test_a_part_says_that_it_is_one(folder: Path) -> None:
    assert "the first 5 of 12" in run("data", "stats", "photos", "--limit", "5", "--output", "out")
    out = run("data", "stats", "generated:captions", "options.size=[48,48]", "--limit", "6", "--output", "made")
    assert "the first 6 of an endless source" in out
    (source,) = json.loads((folder / "made/stats.json").read_text())["sources"]
    assert (source["total"], source["looked_at"]) == ("endless", 6)
    assert source["images"]["height"]["max"] == 48


def test_the_data_of_a_recipe(folder: Path) -> None:
    (folder / "my.yaml").write_text(
        "extends: clothing-mae\ndata:\n  sources: [{source: photos}, {source: 'generated:shapes', limit: 4}]\n"
        "  filter: {kind: text_rich, share: 0.5}\n"
    )
    out = run("data", "stats", "my.yaml", "data.sources.1.split=val", "--output", "out")
    first, second = json.loads((folder / "out/stats.json").read_text())["sources"]
    assert (first["filter"]["kept"], second["filter"]["kept"]) == (6, 2)
    assert second["source"]["split"] == "val"
    assert "4; 0 without an image" in out
    assert {path.name for path in (folder / "out").glob("*.png")} == {
        *("0-kept.png", "0-rejected.png", "1-kept.png", "1-rejected.png"),
    }


def test_pretraining_reads_through_the_filter(folder: Path) -> None:
    out = run(
        *("pretrain", "clothing-mae", "data.sources=[{source: photos}]", "data.filter=text_rich", "steps=2"),
        *("warmup_steps=0", "batch_size=2", "training.threads=1", "--output", "runs"),
    )
    assert "filter text_rich keeps 4 of 12 images (33.3%)" in out
    assert "kind: text_rich" in (folder / "runs/recipe.yaml").read_text()
