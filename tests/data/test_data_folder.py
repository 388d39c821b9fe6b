"""Folders of images: what is a sample, in which order, of which split and class, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.tiny_models import tiny_tokenizer
from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.data.pairs import pair_of
from unclipped.data.readers.folder import FolderSource
from unclipped.data.sample import Sample
from unclipped.data.sources import Source, open_source
from unclipped.data.statistics import statistics_of_images
from unclipped.encoding.chat import ChatEncoder
from unclipped.images.config import ImageRule


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path, format="PNG")
    return path


def opened(folder: Path, **fields: object) -> Source:
    return open_source(SourceConfig(source=str(folder), **fields))


def samples(source: Source) -> list[Sample]:
    return [source[index] for index in range(source.length or 0)]


def test_every_image_below_is_a_sample_in_the_order_of_paths(tmp_path: Path) -> None:
    names = ["cat/b.PNG", "cat/a.jpeg", "cat/old/c.tiff", "Dog/x.webp", "z.gif", "m.bmp", "dog-2/y.tif", "dog-2/y.jpg"]
    for name in [*names, ".hidden.png", ".cache/a.png", "cat/.thumb.png"]:
        picture(tmp_path / name)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = opened(tmp_path)
    found = samples(source)
    expected = [
        "m.bmp",
        "z.gif",
        "Dog/x.webp",
        "cat/a.jpeg",
        "cat/b.PNG",
        "cat/old/c.tiff",
        "dog-2/y.jpg",
        "dog-2/y.tif",
    ]
    assert [sample.id for sample in found] == expected
    assert [sample.category for sample in found] == [None, None, "Dog", "cat", "cat", "cat", "dog-2", "dog-2"]
    assert [sample.images[0].source for sample in found] == [str(tmp_path / name) for name in expected]
    assert all((sample.question, sample.answer, sample.answers) == ("", "", ()) for sample in found)
    assert samples(pickle.loads(pickle.dumps(source))) == found == samples(opened(tmp_path, format="images"))
    with pytest.raises(IndexError):
        source[8]


def test_splits_are_folders(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png"):
        picture(tmp_path / name)
    assert [(sample.id, sample.category) for sample in samples(opened(tmp_path))] == [
        ("cat/1.png", "cat"),
        ("dog/1.png", "dog"),
    ]
    assert [sample.id for sample in samples(opened(tmp_path, split="val"))] == ["cat/2.png"]
    with pytest.raises(DataError, match="no folder 'test' of images in it; found train, val; set split"):
        opened(tmp_path, split="test")


def test_a_folder_without_splits_is_its_train_split_only(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    assert opened(tmp_path).length == 1
    with pytest.raises(DataError, match="no folder 'val' of images in it; cut one off with part"):
        opened(tmp_path, split="val")


def test_links_are_followed_and_loops_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")  # the same folder twice is no loop
    (tmp_path / "set" / "one.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert [sample.id for sample in samples(opened(tmp_path / "set"))] == ["one.png", "cat/1.png", "dog/1.png"]
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")
    with pytest.raises(DataError, match="link to a folder that it lies in; remove the link"):
        opened(tmp_path / "set")


def test_data_files_win_over_images_and_images_over_notes(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "1.png")
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "a", "image": "images/1.png"}\n')
    assert opened(tmp_path)[0].question == "q"
    assert opened(tmp_path, format="images")[0].id == "images/1.png"
    with pytest.raises(DataError, match=r"found the splits train; set format to images to read its images alone"):
        opened(tmp_path, split="val")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "notes.txt").write_text("notes\n")
    assert opened(tmp_path)[0].images
    assert opened(tmp_path, format="text")[0].turns[0].text == "notes"


def test_a_name_that_is_no_text_still_opens(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(path, "wb") as file:
        file.write(picture(tmp_path / "one.png").read_bytes())
    (strange, _) = samples(opened(tmp_path))
    assert strange.id == r"caf\xe9.png"
    with Image.open(str(strange.images[0].source)) as image:
        assert image.size == (8, 6)


@pytest.mark.parametrize(
    ("files", "fields", "error", "message"),
    [
        (["a.csv", "b.csv", "c/d.mp4", "README"], {"format": "images"}, DataError, "found 2 .csv, 1 README, 1 .mp4"),
        ([], {"format": "images"}, DataError, r"no image \(.bmp, .*\) in this folder; it is empty"),
        (["a.csv"], {}, DataError, "it holds no data file and no image"),
        (["a.png"], {"images": "x"}, UsageError, "images: a folder of images takes none"),
        (["a.png"], {"options": {"prompt": "x"}}, UsageError, "unknown option 'prompt'"),
        (["a.png"], {"format": "qa"}, DataError, "it holds no data file$"),
    ],
)
def test_bad_folders(tmp_path: Path, files: list[str], fields: dict, error: type, message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(error, match=message):
        opened(tmp_path, **fields)


def test_a_file_is_no_folder_of_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format images reads a folder, and this is none"):
        opened(picture(tmp_path / "a.png"), format="images")


def test_encoders_read_it_and_language_models_refuse_it(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    mixture = Mixture(DataConfig(sources=(SourceConfig(source=str(tmp_path)),)))
    item = mixture.read(3)
    mean, _ = statistics_of_images(item.images, ImageRule(rule="squash", size=(8, 8), patch_size=(4, 4)))
    np.testing.assert_allclose(mean, np.array([200, 30, 30]) / 255, atol=1e-3)
    assert isinstance(item, Sample)
    with pytest.raises(DataError, match=r"sample cat/1\.png: an image alone, .*a vision-language model cannot"):
        ChatEncoder(tiny_tokenizer()).tokens(item, [1])
    with pytest.raises(DataError, match="exactly one assistant turn with text, its caption; found 0"):
        pair_of(item)


def test_the_list_is_compact(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"class-{folder}").mkdir()
        for number in range(100):
            (tmp_path / f"class-{folder}" / f"{number:08d}.jpg").touch()
    source = opened(tmp_path)
    assert isinstance(source, FolderSource)
    assert len(source) == 2000
    assert len(pickle.dumps(source)) < 2000 * 32
