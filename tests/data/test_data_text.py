"""Text: documents, held-out share, and blocks drawn by index."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny_models import tiny_tokenizer
from unclipped.core.errors import DataError
from unclipped.data.sample import ImagePart, Sample
from unclipped.data.text import TextConfig, iterate_documents, text_files
from unclipped.encoding.text import TokenBlocks, build_token_blocks, render_documents
from unclipped.training.text import blocks_of


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("\n\n".join(f"red circle {number}" for number in range(100)))
    with gzip.open(tmp_path / "b.txt.gz", "wt") as stream:
        stream.write("blue square\n")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": " "}\n')
    (tmp_path / "list.tsv").write_text("no text\n")
    return tmp_path


def test_folders_globs_and_exclusion(corpus: Path) -> None:
    names = lambda **fields: [file.name for file in text_files(TextConfig(**fields))]  # noqa: E731
    assert names(paths=(str(corpus),)) == ["a.txt", "b.txt.gz", "c.jsonl"]
    assert names(paths=(str(corpus),), exclude=("a.*",)) == ["b.txt.gz", "c.jsonl"]
    assert names(paths=(str(corpus / "*.gz"), str(corpus / "a.txt"), str(corpus))) == ["b.txt.gz", "a.txt", "c.jsonl"]
    with pytest.raises(DataError, match=r"none\.txt"):
        names(paths=(str(corpus / "none.txt"),))
    with pytest.raises(DataError, match="exclude leaves no file"):
        names(paths=(str(corpus),), exclude=("*",))


def test_documents_lose_no_text_and_sides_share_none(corpus: Path) -> None:
    config = TextConfig(paths=(str(corpus),), document_characters=40, holdout_share=0.3)
    documents = list(iterate_documents(config))
    assert "\n\n".join(documents[:-3]).split("\n\n") == [f"red circle {number}" for number in range(100)]
    assert documents[-3:] == ["blue square", "one", "two"]
    sides = {side: list(iterate_documents(config, side)) for side in ("train", "dev")}  # type: ignore[arg-type]
    assert sorted(sides["train"] + sides["dev"]) == sorted(documents)
    assert 0.1 < len(sides["dev"]) / len(documents) < 0.5


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: not valid JSON"):
        list(iterate_documents(TextConfig(paths=(str(tmp_path),))))
    (tmp_path / "c.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(DataError, match="line 1: no text in field 'text'"):
        list(iterate_documents(TextConfig(paths=(str(tmp_path),))))


@settings(max_examples=25, deadline=None)
@given(number=st.integers(1, 400), length=st.integers(1, 60), seed=st.integers(0, 100))
def test_blocks_of_an_epoch_cover_the_text_once(
    tmp_path_factory: pytest.TempPathFactory, number: int, length: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    np.arange(number, dtype="uint16").tofile(path)
    if number < length:
        with pytest.raises(DataError, match="fewer than one block"):
            TokenBlocks(path, "uint16", length, seed=seed)
        return
    blocks = TokenBlocks(path, "uint16", length, seed=seed)
    for epoch in range(2):
        seen = np.sort(np.concatenate([blocks.block(epoch * len(blocks) + k) for k in range(len(blocks))]))
        assert (np.diff(seen) == 1).all()  # consecutive, so none twice and none missed between the ends
        assert number - len(seen) < 2 * length
    copied = pickle.loads(pickle.dumps(blocks))
    assert (copied.block(3) == blocks.block(3)).all()
    assert (TokenBlocks(path, "uint16", length, seed=seed).block(3) == blocks.block(3)).all()


def test_token_blocks_hold_the_documents_with_ends_between(corpus: Path) -> None:
    tokenizer = tiny_tokenizer()
    documents = list(iterate_documents(TextConfig(paths=(str(corpus),))))
    blocks = build_token_blocks(documents, tokenizer, 8)
    whole = tokenizer.decode(np.concatenate(list(blocks.in_order())))
    assert "".join(document + "<|end|>" for document in documents).startswith(whole)
    assert blocks.block(0).dtype == np.int64
    assert blocks.block(0).shape == (8,)
    kept = build_token_blocks(documents, tokenizer, 8, folder=corpus / "cache")
    assert Path(kept.path).parent == corpus / "cache"
    with pytest.raises(DataError, match="fewer than one block"):
        build_token_blocks(["a"], tokenizer, 64)


def test_samples_as_documents_read_as_the_template_writes_them() -> None:
    tokenizer = tiny_tokenizer()
    samples = [Sample.qa("a", [ImagePart("x.png")], "what", "red"), Sample.document("d", "blue")]
    texts = ["".join(text for text, _ in pieces) for pieces in render_documents(samples, tokenizer)]
    assert texts == ["<|user|>what<|assistant|>red", "blue"]


def test_control_tokens_typed_in_pretraining_text_are_characters() -> None:
    tokenizer = tiny_tokenizer()
    end, user = tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    samples = [Sample.qa("a", [], "what <|user|>", "red<|end|>"), Sample.document("d", "blue<|end|>green<|user|>")]
    blocks = build_token_blocks(render_documents(samples, tokenizer), tokenizer, 4)
    whole = [int(token) for token in np.asarray(blocks._tokens)]
    assert whole.count(end) == 2  # one after each document
    assert whole.count(user) == 1
    held = blocks_of(samples, tokenizer, 1, len(whole))
    assert list(held.blocks[0]) == whole
