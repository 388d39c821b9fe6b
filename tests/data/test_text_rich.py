"""The text-rich filter: what is kept follows from the scores alone, scores are made once, and mistakes are named."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import text_detector
from unclipped.core.errors import CheckpointError, DataError, UsageError
from unclipped.data.config import DataConfig, SourceConfig, TextRichFilter
from unclipped.data.mixture import Mixture
from unclipped.data.sources import Source, open_source, open_sources
from unclipped.data.text_rich import detector as detecting
from unclipped.data.text_rich import filtering
from unclipped.data.text_rich.detector import TextDetector, TextRichScorer, builtin_scorer, load_scorer
from unclipped.data.text_rich.filtering import NO_IMAGE, kept_of, scores_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    filtering._say.cache_clear()
    return tmp_path / "cache" / "unclipped" / "scores"


def scene(index: int, *, text: bool) -> Image.Image:
    """A receipt, or the same paper without its strings."""
    drawn = text_detector.generated_scene("receipts", "test", 500 + index)
    return (drawn if text else text_detector.without_text(drawn)).paint()


def folder(path: Path, count: int = 12) -> Path:
    """Images 00.png, 01.png, …: every third one holds text."""
    path.mkdir()
    for index in range(count):
        scene(index, text=index % 3 == 0).save(path / f"{index:02d}.png")
    return path


def opened(path: Path, **fields: Any) -> Source:
    return open_source(SourceConfig(source=str(path), **fields))


def ids(source: Source) -> list[str]:
    return [source[index].id for index in range(source.length or 0)]


def never(*_: Any) -> float:
    raise AssertionError("an image was scored again")


def test_text_is_told_from_the_same_scene_without_it(tmp_path: Path) -> None:
    kept = opened(folder(tmp_path / "photos", 24), filter="text_rich")
    assert ids(kept) == [f"{index:02d}.png" for index in range(0, 24, 3)]
    assert "[text_rich]" in kept.name


@pytest.mark.parametrize(
    ("settings_of_filter", "expected"),
    [
        ({"threshold": 0.7}, [0, 2]),
        ({"threshold": 0.70001}, [0, 5]),
        ({}, [0, 1, 2]),
        ({"share": 0.4}, [0, 2]),  # 2 of the 5 that can be scored
        ({"share": 0.5}, [0, 1, 2]),  # 2.5 is rounded up; of equal scores the earlier is kept
        ({"share": 1.0}, [0, 1, 2, 3, 6]),
    ],
)
def test_what_is_kept(settings_of_filter: dict[str, float], expected: list[int]) -> None:
    scores = np.array([0.9, 0.5, 0.7, 0.1, np.nan, NO_IMAGE, 0.5], dtype=np.float64)
    wanted = {index for index in expected if index != 5} | {4}  # what cannot be read stays
    if "threshold" not in settings_of_filter and "share" not in settings_of_filter:
        wanted |= {6}
    if settings_of_filter.get("threshold") == 0.70001:
        wanted = {0, 4}
    assert kept_of(scores, TextRichFilter(**settings_of_filter)).tolist() == sorted(wanted)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=32) | st.just(float("nan")) | st.just(NO_IMAGE), max_size=40), st.floats(0.01, 1))
def test_a_share_keeps_its_count_of_the_highest(values: list[float], share: float) -> None:
    scores = np.array(values, dtype=np.float32)
    kept = kept_of(scores, TextRichFilter(share=share))
    readable = np.flatnonzero(scores >= 0)
    chosen = kept[scores[kept] >= 0]
    assert len(chosen) == int(share * len(readable) + 0.5)
    assert (np.diff(kept) > 0).all()
    left = np.setdiff1d(readable, chosen)
    if len(chosen) and len(left):
        assert scores[chosen].min() >= scores[left].max()
    assert set(np.flatnonzero(np.isnan(scores))) <= set(kept.tolist())


def test_scores_are_kept_and_made_again_for_changed_images(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = folder(tmp_path / "photos")
    first = scores_of(opened(photos))
    assert first.dtype == np.float32
    with monkeypatch.context() as patch:
        patch.setattr(TextRichScorer, "score", never)
        assert np.array_equal(scores_of(opened(photos)), first)
        assert len(list(cache.glob("*.npy"))) == 1
    scene(0, text=False).save(photos / "00.png")
    again = scores_of(opened(photos))
    assert again[0] < 0.5 <= first[0]
    assert np.array_equal(again[1:], first[1:])


def test_damaged_scores_are_made_again(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = folder(tmp_path / "photos", 4)
    first = scores_of(opened(photos))
    (file,) = cache.glob("*.npy")
    file.write_bytes(file.read_bytes()[:90])
    assert np.array_equal(scores_of(opened(photos)), first)
    assert "the kept scores are damaged" in caplog.text


def test_an_interrupted_pass_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = folder(tmp_path / "photos", 10)
    whole = scores_of(opened(photos))
    (file,) = cache.glob("*.npy")
    file.unlink()
    monkeypatch.setattr(filtering, "_SAVE_EVERY", 4)
    plain = TextRichScorer.score
    calls: list[int] = []

    def interrupted(self: TextRichScorer, image: Image.Image) -> float:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(TextRichScorer, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scores_of(opened(photos))
        (part,) = cache.glob("*.part")
        assert part.stat().st_size == 4 * 4
        part.write_bytes(part.read_bytes() + b"torn.")  # a write that was cut off
        calls[:] = [1] * 10
        assert np.array_equal(scores_of(opened(photos)), whole)
        assert len(calls) == 10 + 6  # the first block was not scored again
    assert not list(cache.glob("*.part"))


def test_without_a_cache_folder_it_works_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photos = folder(tmp_path / "photos", 4)
    with_cache = scores_of(opened(photos))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.array_equal(scores_of(opened(photos)), with_cache)
    assert "images are scored again in every run" in caplog.text


def test_a_cut_source_has_its_own_scores(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos")
    whole = scores_of(opened(photos))
    assert np.array_equal(scores_of(opened(photos, limit=5)), whole[:5])
    assert ids(opened(photos, limit=5, filter="text_rich")) == ["00.png", "03.png"]


def tar_of(path: Path, count: int = 9) -> Path:
    with tarfile.open(path, "w") as archive:
        for index in range(count):
            stream = io.BytesIO()
            scene(index, text=index % 3 == 0).save(stream, "PNG")
            for name, content in ((f"{index}.png", stream.getvalue()), (f"{index}.txt", b"a scene")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_tar_shards_are_told_by_their_state_and_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tar_of(tmp_path / "a.tar")
    kept = opened(shard, filter="text_rich")
    assert ids(kept) == ["a/0", "a/3", "a/6"]
    assert getattr(kept, "runs", None) is not None  # still read window by window
    with monkeypatch.context() as patch:
        patch.setattr("unclipped.data.readers.tar.TarSource.__getitem__", never)
        assert len(scores_of(opened(shard))) == 9
        patch.setattr(TextRichScorer, "score", never)
        with pytest.raises(AssertionError, match="scored again"):
            scores_of(opened(shard, limit=4))  # another part of the shard
    tar_of(shard, 10)
    os.utime(shard, (1, 1))
    assert ids(opened(shard, filter="text_rich")) == ["a/0", "a/3", "a/6", "a/9"]


def test_questions_about_images_without_one_and_unreadable_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = folder(tmp_path / "photos", 4)
    (photos / "bad.png").write_bytes(b"\x89PNG no")
    rows = [
        *('{"id": "text", "question": "two and two?", "answer": "4"}',),
        *('{"id": "bad", "image": "bad.png", "question": "what?", "answer": "x"}',),
        *(f'{{"id": "q{i}", "image": "0{i % 4}.png", "question": "what?", "answer": "x"}}' for i in range(8)),
    ]
    (photos / "train.jsonl").write_text("\n".join(rows))
    kept = opened(photos, filter="text_rich")
    assert ids(kept) == ["bad", "q0", "q3", "q4", "q7"]
    assert "bad.png" in caplog.text
    config = DataConfig(sources=(SourceConfig(source=str(photos)),), filter="text_rich", on_bad_sample="skip")  # type: ignore[arg-type]
    assert Mixture(config).length == 5


def test_the_filter_of_the_data_holds_for_every_source_without_its_own(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", 6), folder(tmp_path / "two", 9)
    config = DataConfig.model_validate(
        {
            "sources": [{"source": str(one)}, {"source": str(two), "filter": {"kind": "text_rich", "share": 0.9}}],
            "filter": {"kind": "text_rich", "threshold": 0.5},
        }
    )
    assert [source.length for source in open_sources(config)] == [2, 8]
    assert Mixture(config).length == 10


def _draws(config: DataConfig, queue: Any) -> None:
    queue.put([Mixture(config, seed=3).read(index).id for index in range(8)])


def test_draws_are_the_same_in_every_process_and_after_pickling(tmp_path: Path) -> None:
    config = DataConfig.model_validate(
        {"sources": [{"source": str(folder(tmp_path / "photos"))}], "filter": "text_rich"}
    )
    mixture = Mixture(config, seed=3)
    drawn = [mixture.read(index).id for index in range(8)]
    assert set(drawn) == {"00.png", "03.png", "06.png", "09.png"}
    assert [pickle.loads(pickle.dumps(mixture)).read(index).id for index in range(4, 8)] == drawn[4:]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_draws, args=(config, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [drawn, drawn]
    for process in processes:
        process.join()


def test_a_limited_generated_source() -> None:
    options = {"scenes": {"shapes": 1, "receipts": 1}, "size": [112, 112]}
    kept = open_source(SourceConfig(source="generated:captions", options=options, limit=30, filter="text_rich"))  # type: ignore[arg-type]
    assert {kept[index].category for index in range(kept.length or 0)} == {"receipts"}


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda path: opened(folder(path / "p", 3), filter={"kind": "text_rich", "threshold": 1.0}),
            DataError,
            r"keeps none of 3 images: the highest score is [01][.\d]* \(sample 00\.png\), below the threshold 1; lower",
        ),
        (
            lambda path: opened(folder(path / "p", 3), filter={"kind": "text_rich", "share": 0.1}),
            DataError,
            r"share 0\.1 of 3 images is less than half of one; the highest score is [01][.\d]* .*raise filter\.share",
        ),
        (
            lambda path: open_source(SourceConfig(source="generated:shapes", filter="text_rich")),
            UsageError,
            "set limit",
        ),
        (
            lambda _: open_source(SourceConfig(source="generated:majority", limit=4, filter="text_rich")),
            DataError,
            "of 4 samples 4 have no image",
        ),
    ],
)
def test_a_filter_that_cannot_be(tmp_path: Path, make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_threshold_or_share() -> None:
    with pytest.raises(ValueError, match="both set"):
        TextRichFilter(threshold=0.4, share=0.1)


# The scorer


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (700, 40), (31, 33), (640, 512)])
def test_any_image_has_a_score(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    scorer = builtin_scorer()
    for image in (Image.fromarray(noise), Image.new("L", size, 200)):
        assert 0 <= scorer.score(image) <= 1
        assert scorer.score(image) == scorer.score(image.copy())


def test_plain_colour_and_noise_hold_no_text() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    for image in (Image.new("RGB", (96, 96), "white"), Image.new("RGB", (40, 200)), Image.fromarray(noise)):
        assert builtin_scorer().score(image) < 0.5


def test_the_weights_say_what_they_were_trained_on_and_how_well_they_do(data_folder: Path) -> None:
    path = Path(detecting.__file__).parent / detecting.WEIGHTS
    scorer, told = load_scorer(path)
    assert path.stat().st_size < 40_000
    assert (scorer.slope > 0).all()  # more text, higher score
    assert {"command", "trained_on", "measured"} <= set(told)
    assert scorer.digest == builtin_scorer().digest
    for name, split, is_rich in text_detector.MEASURED:
        row = told["measured"][f"{name} {split}"]
        pictures = text_detector.images_of(data_folder / name, split, 40)
        right = np.mean([(scorer.score(picture) >= 0.5) == is_rich for picture in pictures])
        assert right >= row["accuracy"] - 0.15, (name, right, row)


def test_training_is_repeatable_and_learns() -> None:
    scenes = []
    for index in range(24):
        drawn = text_detector.generated_scene("receipts", "train", index)
        drawn = drawn if index % 2 else text_detector.without_text(drawn)
        scenes.append((np.asarray(drawn.paint().convert("L")), text_detector.text_map(drawn)))
    photographs = [np.full((64, 64), value, dtype=np.uint8) for value in (40, 200)]
    one, two = (text_detector.train_detector(scenes, photographs, steps=3) for _ in range(2))
    for name, tensor in one.state_dict().items():
        assert (tensor == two.state_dict()[name]).all(), name
    pixels, labels = text_detector.training_image(5, scenes, photographs)
    assert (pixels.shape, labels.shape, pixels.dtype) == ((128, 128), (32, 32), np.uint8)
    assert set(np.unique(labels)) <= {0.0, 1.0}


def test_scorers_are_saved_and_loaded(tmp_path: Path) -> None:
    scorer = TextRichScorer(TextDetector(), np.array([1.0, 2.0]), -0.5)
    scorer.save(tmp_path / "a.safetensors", {"trained_on": "nothing"})
    again, told = load_scorer(tmp_path / "a.safetensors")
    assert told == {"trained_on": "nothing"}
    image = scene(0, text=True)
    assert again.score(image) == pytest.approx(scorer.score(image), abs=1e-2)  # half precision in the file
    assert again.digest != scorer.digest
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no weights of the text detector"):
        load_scorer(tmp_path / "a.safetensors")
