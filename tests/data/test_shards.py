"""Tar shards: the samples `datasets` reads, each once an epoch, near each other; damage is named and counted."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from unclipped.core.errors import DataError, UsageError
from unclipped.data import shards
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.data.order import Runs
from unclipped.data.pairs import pair_of
from unclipped.data.readers.tar import TarSource
from unclipped.data.sources import LimitedSource, SelectedSource, open_source
from unclipped.images.decode import load_image
from unclipped.training.batches import StageBatches, StageLoader
from unclipped.training.config import StageConfig

Member = tuple[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unclipped" / "shards"


def picture(value: int = 0, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (value % 256, value // 256, 7)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, members: Iterable[Member], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pairs(start: int, count: int) -> list[Member]:
    return [
        member
        for number in range(start, start + count)
        for member in ((f"{number:05}.png", picture(number)), (f"{number:05}.txt", f"caption {number}\n".encode()))
    ]


def written(folder: Path, lengths: Iterable[int]) -> list[int]:
    """Shards `data-000.tar` … with consecutive samples; returns the bounds."""
    bounds = [0]
    for shard, length in enumerate(lengths):
        write(folder / f"data-{shard:03}.tar", pairs(bounds[-1], length))
        bounds.append(bounds[-1] + length)
    return bounds


def opened(path: Path, **options: Any) -> TarSource:
    source = open_source(SourceConfig(source=str(path), options=options))
    assert isinstance(source, TarSource)
    return source


def mixed(folder: Path, window: int = 8, seed: int = 3, **fields: Any) -> Mixture:
    source = SourceConfig(source=str(folder), options={"window": window})
    return Mixture(DataConfig(sources=(source,), **fields), seed)


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_that_datasets_reads(tmp_path: Path, layout: int) -> None:
    import datasets

    long = "folder/" + "k" * 60 + "/" + "n" * 60  # a path of more than 100 bytes: a second header
    members = [
        ("./a.jpg", picture(1, "JPEG")),
        ("./a.txt", b" one\n"),
        ("sub/b.jpg", picture(2)),  # told by content, not by its name
        ("sub/b.txt", "zwei \u00e4".encode()),
        (f"{long}.jpg", picture(3)),
        (f"{long}.txt", b"three"),
    ]
    path = write(tmp_path / "x.tar", members, format=layout)
    ours = opened(path)
    theirs = list(
        datasets.load_dataset(
            "webdataset", data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path / "hf")
        )
    )
    assert len(ours) == len(theirs) == 3
    for index, row in enumerate(theirs):
        image, caption = pair_of(ours[index])
        assert ours[index].id == f"x/{row['__key__']}"
        assert caption == row["txt"].strip()
        assert np.array_equal(np.asarray(load_image(image.source)), np.asarray(row["jpg"].convert("RGB")))


def test_captions_from_members_and_json_and_images_alone(tmp_path: Path) -> None:
    members = [
        ("a.webp", picture(1, "WEBP")),
        ("a.json", b'{"alt": "from json", "n": 3}'),
        ("a.caption", b"from caption"),
        ("a.txt", b"from txt"),
        ("a.cls", b"4"),
        ("._a.txt", b"a hidden file"),
    ]
    path = write(tmp_path / "x.tar", members)
    assert opened(path)[0].answer == "from txt"
    assert opened(path, caption="alt")[0].answer == "from json"
    alone = opened(path, caption="none")[0]
    assert (len(alone.images), alone.answers, len(alone.turns)) == (1, (), 1)
    with pytest.raises(DataError, match=r"member a\.json: no text in field 'n', the caption; found the fields alt, n"):
        opened(path, caption="n")[0]
    write(path, [*members[:3]])
    assert opened(path)[0].answer == "from caption"


def test_patterns_globs_folders_and_splits(tmp_path: Path) -> None:
    written(tmp_path, (2, 3, 1))
    for name in ("data-{000..002}.tar", "data-00{0,1,2}.tar", "data-*.tar", "."):
        source = open_source(SourceConfig(source=str(tmp_path / name)))
        assert [source[index].answer for index in range(6)] == [f"caption {index}" for index in range(6)]
    write(tmp_path / "val-0.tar", pairs(90, 1))
    assert open_source(SourceConfig(source=str(tmp_path), split="val")).length == 1


def test_the_index_is_kept_and_made_again_for_a_changed_shard(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.tar", pairs(0, 3))
    opened(path)
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_scan", None)
        assert isinstance(shards.index_of(path), np.memmap)
    write(path, pairs(0, 40))
    assert len(opened(path)) == 40
    os.unlink(path)
    write(path, pairs(0, 4))
    opened(path)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert len(opened(path)) == 4
    assert "is damaged" in caplog.text
    assert kept.is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # no folder
    assert opened(path)[3].answer == "caption 3"
    assert "cannot be written" in caplog.text


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    window=st.integers(1, 30),
    seed=st.integers(0, 2**31 - 1),
)
def test_an_order_holds_every_sample_once_and_stays_in_its_window(lengths: list[int], window: int, seed: int) -> None:
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    order = Runs(bounds, window).order([seed, 0])
    listed = [order[place] for place in range(len(order))]
    assert sorted(listed) == list(range(sum(lengths)))
    files = np.searchsorted(bounds, listed, side="right") - 1
    concatenated = [sample for file in _in_order(order, lengths, bounds) for sample in range(*bounds[file : file + 2])]
    for start in range(0, len(listed), window):
        assert sorted(listed[start : start + window]) == sorted(concatenated[start : start + window])
    assert len(set(files[:window])) <= window
    again = Runs(bounds, window).order([seed, 0])
    assert [again[place] for place in reversed(range(len(again)))] == listed[::-1]


def _in_order(order: Any, lengths: list[int], bounds: np.ndarray) -> list[int]:
    """The files that hold samples, in the order of the epoch."""
    generator = np.random.default_rng([*order.seed, 0])
    return [int(file) for file in generator.permutation(len(lengths)) if bounds[file + 1] > bounds[file]]


def test_epochs_hold_every_sample_and_differ(tmp_path: Path) -> None:
    written(tmp_path, (5, 7, 4, 8))
    mixture = mixed(tmp_path)
    epochs = [[mixture.sample(24 * epoch + place).answer for place in range(24)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(f"caption {index}" for index in range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = pickle.loads(pickle.dumps(mixed(tmp_path)))
    assert [again.sample(24 + place).answer for place in range(24)] == epochs[1]
    assert [mixed(tmp_path, seed=4).sample(place).answer for place in range(24)] != epochs[0]


def test_a_window_reads_from_few_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, [10] * 40)
    mixture = mixed(tmp_path, window=20)
    touched: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: touched.append(str(path)) or real(path, *rest))
    for start in range(0, 400, 20):
        before = len(touched)
        for place in range(start, start + 20):
            mixture.sample(place)
        assert len({name for name in touched[before:] if name.endswith(".tar")}) <= 3  # window / shard + 1
    assert len(touched) == 40  # no shard is opened twice in an epoch


def test_parts_and_limits_keep_the_windows(tmp_path: Path) -> None:
    bounds = written(tmp_path, (5, 7, 4))
    source = opened(tmp_path, window=4)
    limited, chosen = LimitedSource(source, 9), SelectedSource(source, [0, 4, 5, 11, 12])
    assert limited.runs is not None
    assert chosen.runs is not None
    assert limited.runs.bounds.tolist() == [0, 5, 9, 9]
    assert chosen.runs.bounds.tolist() == [0, 2, 4, 5]
    assert sorted(chosen.runs.order([1])) == [0, 1, 2, 3, 4]
    assert SelectedSource(source, [3, 1]).runs is None
    assert source.runs.bounds.tolist() == bounds


class Answers:
    """Training examples that are captions."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def batch(self, indices: Any) -> dict[str, Any]:
        return {"sample_ids": [self.mixture.sample(index).answer for index in indices]}

    def lengths(self, indices: Any) -> list[int]:
        return [1] * len(indices)


def loaded(mixture: Mixture, *, start: int = 0, world: int = 1, rank: int = 0, workers: int = 0) -> list[list[str]]:
    stage = StageConfig(name="one", steps=8, batch_size=4, train={"connector": 1e-3})
    batches = StageBatches(Answers(mixture), stage, seed=0, world_size=world, rank=rank)
    loader = StageLoader(batches, lambda: start, workers=workers, pin_memory=False)
    return [batch["sample_ids"] for batch in loader]


def test_a_run_resumed_inside_a_shard_goes_on_as_the_unbroken_one(tmp_path: Path) -> None:
    written(tmp_path, (9, 14, 9))
    unbroken = loaded(mixed(tmp_path))
    assert sorted(name for batch in unbroken for name in batch) == sorted(f"caption {index}" for index in range(32))
    for start in (1, 3, 6):
        assert loaded(mixed(tmp_path), start=start) == unbroken[start:]
    assert loaded(mixed(tmp_path), start=3, workers=2) == unbroken[3:]


def test_processes_share_an_epoch_without_overlap(tmp_path: Path) -> None:
    written(tmp_path, (9, 14, 9))
    ranks = [loaded(mixed(tmp_path), world=2, rank=rank) for rank in range(2)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == loaded(mixed(tmp_path))
    assert len({name for rank in ranks for batch in rank for name in batch}) == 32


def test_workers_started_afresh_read_too(tmp_path: Path) -> None:
    written(tmp_path, (3, 3))
    source = pickle.loads(pickle.dumps(opened(tmp_path)))
    assert [source[index].answer for index in (5, 0)] == ["caption 5", "caption 0"]
    read = DataLoader(source, batch_size=None, sampler=range(6), num_workers=2, collate_fn=None)
    assert [sample.answer for sample in read] == [f"caption {index}" for index in range(6)]


def test_more_shards_than_are_kept_open(tmp_path: Path) -> None:
    written(tmp_path, [1] * 40)
    source = opened(tmp_path)
    assert [source[index].answer for index in range(39, -1, -1)] == [f"caption {index}" for index in range(39, -1, -1)]
    assert len(source._descriptors) == 16


def damaged(path: Path) -> list[str]:
    """What reading each sample says: its caption, or the error."""
    found = []
    source = opened(path)
    for index in range(len(source)):
        try:
            image, caption = pair_of(source[index])
            load_image(image.source, name=image.label)
            found.append(caption)
        except DataError as error:
            found.append(str(error).replace(str(path), "x.tar"))
    return found


def offset(path: Path, name: str, *, header: bool = False) -> int:
    with tarfile.open(path) as archive:
        member = archive.getmember(name)
        return member.offset if header else member.offset_data


def spoil(path: Path, at: int, size: int = 20) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(b"\xff" * size)


def test_a_corrupt_image_is_named_or_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.tar", pairs(0, 6))
    spoil(path, offset(path, "00002.png"))
    found = damaged(path)
    assert "x.tar, member 00002.png" in found[2]
    assert [found[index] for index in (0, 1, 3, 4, 5)] == [f"caption {index}" for index in (0, 1, 3, 4, 5)]
    mixture = mixed(tmp_path, on_bad_sample="skip")

    def read(item: Any) -> str:
        image, caption = pair_of(item)
        load_image(image.source, name=image.label)
        return caption

    with caplog.at_level(logging.WARNING, logger="unclipped.data"):
        captions = {mixture.first_good(place, read) for place in range(6)}
    assert captions == {f"caption {index}" for index in (0, 1, 3, 4, 5)}
    assert mixture.skipped == 1
    assert "member 00002.png" in caplog.text
    with pytest.raises(DataError, match=r"x\.tar, member 00002\.png"):
        [mixed(tmp_path).first_good(place, read) for place in range(6)]


def test_a_damaged_header_is_a_bad_sample_and_the_scan_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.tar", pairs(0, 4))
    at = offset(path, "00001.txt", header=True)
    spoil(path, at)
    found = damaged(path)
    assert found[0] == "caption 0"
    assert found[1].startswith("shard x.tar, sample 00001: no caption")
    assert found[2].startswith(f"shard x.tar, byte {at}, after sample 00001: a damaged tar header")
    assert found[3:] == ["caption 2", "caption 3"]
    assert "1 of 5 samples are damaged" in caplog.text


@pytest.mark.parametrize(
    ("member", "extra", "expected"),
    [
        ("00002.png", 30, "x.tar, member 00002.png: the shard is cut: the member has"),
        ("00002.txt", 4, "x.tar, member 00002.txt: the shard is cut: the member has 10 bytes, 4 are there"),
        ("00002.txt", -512, "after sample 00002: the archive stops without its end mark"),
        ("00002.txt", -100, "a damaged tar header"),
    ],
)
def test_a_shard_that_is_cut(tmp_path: Path, member: str, extra: int, expected: str) -> None:
    path = write(tmp_path / "x.tar", pairs(0, 4))
    os.truncate(path, offset(path, member) + extra)
    found = damaged(path)
    assert found[:2] == ["caption 0", "caption 1"]
    assert expected in found[-1]


def test_archives_one_behind_the_other_are_read_whole(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.tar", pairs(0, 2)), write(tmp_path / "b.tar", pairs(2, 2))
    both = tmp_path / "x.tar"
    both.write_bytes(one.read_bytes() + other.read_bytes())
    assert damaged(both) == [f"caption {index}" for index in range(4)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", picture())], r"x\.tar, sample a: no caption: expected the member a\.txt or a\.caption"),
        ([("a.txt", b"x")], r"x\.tar, sample a: no image: expected one member a with \.jpg"),
        ([("a.png", picture()), ("a.txt", b" \n")], r"member a\.txt: the caption is empty"),
        ([("a.png", picture()), ("a.txt", b"\xff\xfe")], r"member a\.txt: not UTF-8 text"),
        ([("a.png", picture()), ("a.jpg", picture())], "sample a: two members of one kind"),
        ([("a.png", picture()), ("b.png", picture()), ("a.txt", b"x")], r"sample a: the key is in the shard twice"),
        ([], r"x\.tar, no sample in it"),
        ([("README", b"x")], r"x\.tar, no sample in it"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, members: list[Member], message: str) -> None:
    source = opened(write(tmp_path / "x.tar", members))
    with pytest.raises(DataError, match=message):
        source[len(source) - 1 if "twice" in message else 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"cap', r"member a\.json: not valid JSON"), (b"[1]", "expected a JSON object, found list"), (None, r"a\.json")],
)
def test_bad_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    members = [("a.png", picture()), *([] if content is None else [("a.json", content)])]
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path / "x.tar", members), caption="cap")[0]


def test_an_empty_file_is_an_empty_shard(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    with pytest.raises(DataError, match="no sample in it"):
        opened(tmp_path / "x.tar")[0]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_a_compressed_shard_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(write(tmp_path / "plain", pairs(0, 1)).read_bytes()))
    with pytest.raises(DataError, match=r"compressed with gzip; .* needs a plain tar: decompress"):
        opened(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("data-{000..004}.tar", {}, DataError, r"2 of 5 shards missing, the first .*data-003\.tar"),
        ("data-{004..000}.tar", {}, UsageError, "is empty; swap its ends"),
        ("data-{000,000}.tar", {}, DataError, "named twice"),
        ("none-*.tar", {}, DataError, r"no \.tar file there"),
        ("gone.tar", {}, DataError, "1 of 1 shards missing"),
        (".", {"options": {"windows": 3}}, UsageError, "unknown option windows; expected caption or window"),
        (".", {"options": {"window": 0}}, UsageError, "option window: expected a number of samples, found 0"),
        (".", {"options": {"caption": 3}}, UsageError, "option caption: expected a field"),
        (".", {"images": "x"}, UsageError, "remove images"),
        ("text.tar", {}, DataError, "not a tar archive"),
    ],
)
def test_wrong_sources(tmp_path: Path, name: str, fields: dict, error: type[Exception], message: str) -> None:
    written(tmp_path, (1, 1, 1))
    if name == "text.tar":
        (tmp_path / name).write_text("no archive " * 100)
    with pytest.raises(error, match=message):
        open_source(SourceConfig(source=str(tmp_path / name), **fields))
