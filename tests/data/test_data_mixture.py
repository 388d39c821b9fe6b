"""Mixtures: draw i is a function of seed and i; epochs are whole; weights hold; bad samples are replaced, not lost."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny_models import tiny_tokenizer
from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.data.sample import ImagePart, Sample, SampleGroup
from unclipped.encoding.examples import encode


class Listed:
    """Samples `name-0` … in memory; those in `bad` cannot be read; `per_image` neighbours share an image."""

    def __init__(self, name: str, length: int | None, bad: tuple[int, ...] = (), per_image: int | None = None) -> None:
        self.name, self.length, self.bad, self.per_image = name, length, bad, per_image
        self.samples_per_image = per_image or 1

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise DataError(f"{self.name}, sample {index}: bad")
        images = [] if self.per_image is None else [ImagePart(f"{index // self.per_image}.png")]
        return Sample.qa(f"{self.name}-{index}", images, f"what {index}", "red")


def mixture(*sources: Any, weights: tuple[float, ...] | None = None, seed: int = 0, **fields: Any) -> Mixture:
    weights = weights or (1.0,) * len(sources)
    configs = tuple(
        SourceConfig(source=source.name, weight=weight) for source, weight in zip(sources, weights, strict=True)
    )
    return Mixture(DataConfig(sources=configs, **fields), seed, sources=sources)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    seed=st.integers(0, 2**31 - 1),
)
def test_epochs_neither_repeat_nor_miss_a_sample(lengths: list[int], weights: list[float], seed: int) -> None:
    sources = [Listed(f"s{which}", length) for which, length in enumerate(lengths)]
    mixed = mixture(*sources, weights=tuple(weights[: len(lengths)]), seed=seed)
    streams: dict[int, list[int]] = {which: [] for which in range(len(lengths))}
    for index in range(400):
        which, unit = mixed.place(index)
        streams[which].append(unit)
    for which, length in enumerate(lengths):
        stream = streams[which]
        for start in range(0, len(stream) - length + 1, length):
            assert sorted(stream[start : start + length]) == list(range(length))


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(60)), seed=st.integers(0, 1000))
def test_draws_do_not_depend_on_what_was_drawn_before(order: list[int], seed: int) -> None:
    sources = (Listed("a", 7), Listed("b", None), Listed("c", 13))
    one, other = (mixture(*sources, weights=(1, 2, 0.5), seed=seed) for _ in range(2))
    assert {index: one.sample(index).id for index in order} == {index: other.sample(index).id for index in range(60)}


def test_weights_are_shares_of_draws() -> None:
    mixed = mixture(Listed("a", 10), Listed("b", None), Listed("c", 1000), weights=(1, 6, 3))
    counts = Counter(mixed.place(index)[0] for index in range(10_000))
    assert [counts[which] for which in range(3)] == pytest.approx([1000, 6000, 3000], abs=40)
    drawn = [mixed.place(index) for index in range(2000)]
    endless = [unit for which, unit in drawn if which == 1]
    assert endless == list(range(len(endless)))


def test_epochs_and_seeds_differ_and_copies_agree() -> None:
    mixed = mixture(Listed("a", 50))
    first, second = ([mixed.sample(start + k).id for k in range(50)] for start in (0, 50))
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != [mixture(Listed("a", 50), seed=1).sample(k).id for k in range(50)]
    assert (
        mixture(Listed("a", 50), seed=5).sample(3).id
        == pickle.loads(pickle.dumps(mixture(Listed("a", 50), seed=5))).sample(3).id
    )
    assert mixed.length == 50
    assert mixture(Listed("a", 50), Listed("b", None)).length is None


def test_a_share_too_small_to_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match="smallest share"):
        mixture(Listed("a", 5), Listed("b", 5), weights=(1e-7, 1))


def test_bad_samples_stop_or_are_counted_logged_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    source = Listed("a", 20, bad=(3, 4))
    with pytest.raises(DataError, match=r"sample 3|sample 4"):
        [mixture(source).sample(k) for k in range(20)]
    mixed = mixture(source, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING, logger="unclipped.data"):
        ids = [mixed.sample(k).id for k in range(20)]
    assert mixed.skipped >= 2
    assert len(caplog.records) == mixed.skipped
    assert "a, sample 3: bad" in caplog.text
    assert ids == [mixture(source, on_bad_sample="skip").sample(k).id for k in range(20)]
    places = [mixed.place(k)[1] for k in range(21)]
    for k in range(20):
        if places[k] in (3, 4) and places[k + 1] not in (3, 4):
            assert ids[k] == f"a-{places[k + 1]}"


def test_only_bad_samples_end_in_an_error() -> None:
    with pytest.raises(DataError, match="in a row"):
        mixture(Listed("a", 3, bad=(0, 1, 2)), on_bad_sample="skip").sample(0)


def test_what_cannot_be_encoded_is_skipped_too() -> None:
    class Unanswered(Listed):
        def __getitem__(self, index: int) -> Sample:
            return Sample.qa(f"a-{index}", [], "what", None if index == 2 else "red")

    tokenizer = tiny_tokenizer()

    def ids(mixed: Mixture) -> list[str]:
        return [mixed.first_good(index, lambda item: encode(item, tokenizer)).id for index in range(6)]

    assert "a-2" not in ids(mixture(Unanswered("a", 6), on_bad_sample="skip"))
    with pytest.raises(DataError, match="no supervised token"):
        ids(mixture(Unanswered("a", 6)))


@pytest.mark.parametrize("max_group", [None, 2])
def test_samples_about_one_image_are_drawn_together(max_group: int | None) -> None:
    mixed = mixture(Listed("a", 10, per_image=3), share_image=True, max_group=max_group)
    items = [mixed.sample(k) for k in range(mixed.length or 0)]
    members = [
        tuple(sample.id for sample in item.samples) if isinstance(item, SampleGroup) else (item.id,) for item in items
    ]
    assert sorted(name for group in members for name in group) == sorted(f"a-{k}" for k in range(10))
    for item in items:
        if isinstance(item, SampleGroup):
            assert len({sample.images for sample in item.samples}) == 1
            assert len(item.samples) <= (max_group or 3)
    assert len(members) == (4 if max_group is None else 7)


def test_endless_sources_group_by_what_they_declare() -> None:
    item = mixture(Listed("a", None, per_image=4), share_image=True).sample(2)
    assert isinstance(item, SampleGroup)
    assert [sample.id for sample in item.samples] == ["a-8", "a-9", "a-10", "a-11"]
    fewer = mixture(Listed("a", None, per_image=4), share_image=True, max_group=3).sample(2)
    assert isinstance(fewer, SampleGroup)
    assert [sample.id for sample in fewer.samples] == ["a-4", "a-5"]


def test_text_only_neighbours_are_not_grouped() -> None:
    assert mixture(Listed("a", 5), share_image=True).length == 5


def test_blind_removes_images_of_samples_and_groups() -> None:
    assert mixture(Listed("a", 5, per_image=1), blind="removed").sample(0).images == ()
    group = mixture(Listed("a", 6, per_image=3), blind="removed", share_image=True).sample(0)
    assert isinstance(group, SampleGroup)
    assert all(not sample.images for sample in group.samples)


def test_length_estimates_grow_with_text_and_images() -> None:
    mixed = mixture(Listed("a", 4, per_image=1))
    assert mixed.lengths(0) > 64
    assert mixture(Listed("a", 4, per_image=1), blind="removed").lengths(0) < 10
