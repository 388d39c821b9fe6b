"""The real sets open as they lie, and their samples encode."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny_models import tiny_tokenizer
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.data.sample import SampleGroup
from unclipped.data.sources import open_source
from unclipped.data.statistics import pixel_statistics
from unclipped.data.text import TextConfig, iterate_documents
from unclipped.encoding.examples import encode
from unclipped.encoding.text import build_token_blocks
from unclipped.models.image_processing import UnclippedImageProcessor
from unclipped.models.processing import UnclippedProcessor

SETS = [
    ("bccd", "train", 820), ("bccd", "val", 348), ("bccd", "test", 288),
    ("chartqa", "train", 1000), ("chartqa", "val", 195),
    ("clothing", "train", 3068), ("clothing", "val", 341), ("clothing", "test", 372),
    ("nlvr", "train", 30000), ("nlvr", "val", 2967),
    ("sroie", "train_lines", 9000), ("sroie", "val_lines", 1585),
    ("sroie", "train_fields", 1000), ("sroie", "val_fields", 145),
    ("tabmwp", "train", 5000), ("tabmwp", "val", 1000),
    ("tabmwp", "train_lookup", 7664), ("tabmwp", "val_lookup", 1090),
]  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> UnclippedProcessor:
    return UnclippedProcessor(UnclippedImageProcessor(patch_size=16, max_tokens=64), tiny_tokenizer(), connector="mlp")


@pytest.mark.parametrize(("name", "split", "count"), SETS, ids=lambda value: str(value))
def test_each_set_opens_and_its_ends_encode(
    data_folder: Path, processor: UnclippedProcessor, name: str, split: str, count: int
) -> None:
    source = open_source(SourceConfig(source=str(data_folder / name), split=split))
    assert source.length == count
    for index in (0, count - 1):
        sample = source[index]
        assert sample.answer
        assert len(sample.images) == 1
        example = encode(sample, processor)
        assert example.num_supervised > 0
        assert example.pixel_values is not None


@pytest.mark.parametrize(
    ("name", "split", "pattern", "clusters"),
    [("nlvr", "val", r"^dev-(\d+-\d+)-", None), ("sroie", "val_lines", r"sroie-line-(\d+)-", 50)],
)
def test_clusters_are_scenes_and_receipts(
    data_folder: Path, name: str, split: str, pattern: str, clusters: int | None
) -> None:
    config = SourceConfig(source=str(data_folder / name), split=split, cluster=pattern)
    source = open_source(config)
    found = {source[index].cluster for index in range(source.length or 0)}
    assert clusters is None or len(found) == clusters
    parts = [
        open_source(config.model_copy(update={"part": part}))
        for part in (
            SourceConfig.model_validate({"source": "x", "part": {"share": 0.2, "side": side}}).part
            for side in ("train", "dev")
        )
    ]
    assert sum(part.length or 0 for part in parts) == source.length
    sides = [{part[index].cluster for index in range(part.length or 0)} for part in parts]
    assert not sides[0] & sides[1]


def test_scene_questions_share_their_image(data_folder: Path, processor: UnclippedProcessor) -> None:
    config = DataConfig(sources=(SourceConfig(source=str(data_folder / "nlvr"), split="val"),), share_image=True)
    mixture = Mixture(config)
    assert mixture.length == 989
    group = mixture.sample(0)
    assert isinstance(group, SampleGroup)
    row = encode(group, processor)
    alone = [encode(sample, processor) for sample in group.samples]
    assert row.num_supervised == sum(example.num_supervised for example in alone)
    assert len(row.input_ids) < sum(len(example.input_ids) for example in alone) * 0.6


def test_statistics_of_receipt_lines(data_folder: Path) -> None:
    source = open_source(SourceConfig(source=str(data_folder / "sroie"), split="train_lines"))
    rule = UnclippedImageProcessor(patch_size=(32, 8), fixed_height=32, channels=1, max_tokens=56)
    mean, std = pixel_statistics([source], rule, 200)
    assert mean[0] == pytest.approx(0.825, abs=0.03)
    assert std[0] == pytest.approx(0.265, abs=0.03)


def test_text_becomes_blocks_without_the_excluded_file(data_folder: Path) -> None:
    everything = TextConfig(paths=(str(data_folder / "text" / "*.gz"),), exclude=("tabmwp*", "books*", "dict*"))
    documents = iterate_documents(everything)
    first = [next(documents) for _ in range(20)]
    assert all(4000 < len(document) < 20000 for document in first)
    blocks = build_token_blocks(first, tiny_tokenizer(), 128)
    assert len(blocks) > 100
