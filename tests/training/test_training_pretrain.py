"""Pretraining a language model and its tokenizer, and a masked autoencoder, end to end on small shapes."""

from __future__ import annotations

import json
import os
import signal
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_support import assert_equal_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTMAEModel

from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.models.chat import COMPACT_SPECIAL_TOKENS
from unclipped.objectives.language_model import LanguageModelObjective
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.training.config import OptimizerConfig, PretrainConfig, TokenizerConfig, TrainingConfig
from unclipped.training.image_pretraining import build_autoencoder, masked_autoencoder_job
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.pretrain import pretrain
from unclipped.training.text_pretraining import build_decoder, open_corpus
from unclipped.training.tokenizer import train_tokenizer

TRAINING = TrainingConfig(optimizer=OptimizerConfig(name="muon"), log_every_steps=4, threads=1)
SHAPE = {"hidden_size": 32, "intermediate_size": 64}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The cat {i % 7} sat on mat {i % 5}, então." for i in range(400)))
    return path


def language_model(text_file: Path, **fields: Any) -> PretrainConfig:
    sources = (
        SourceConfig(source=str(text_file), options={"document_characters": 60}),
        SourceConfig(source="generated:characters", options={"as_text": True}, weight=0.5),
    )
    given_fields = {
        "shape": SHAPE,
        "tokenizer": TokenizerConfig(kind="characters", documents=50),
        "block_length": 48,
        "prepared_tokens": 4000,
        "held_out_blocks": 6,
        "steps": 12,
        "batch_size": 8,
        "training": TRAINING,
    }
    given_fields["data"] = DataConfig(sources=sources)
    return PretrainConfig(objective="language_model", **(given_fields | fields))


@pytest.mark.parametrize("rows", ["blocks", "samples"])
def test_language_model_learns_and_loads(text_file: Path, tmp_path: Path, rows: str) -> None:
    result = pretrain(language_model(text_file, rows=rows), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(result.model_folder)
    tokenizer = AutoTokenizer.from_pretrained(result.model_folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "number?"}], tokenize=False)
    assert rendered == "<|user|>number?"
    found = result.record["stages"][0]["text_perplexity"]
    assert found["after"]["perplexity"] < 0.9 * found["before"]["perplexity"]
    assert found["after"]["bits_per_byte"] < found["before"]["bits_per_byte"]


def test_interrupted_pretraining_resumes_to_equal_weights(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = language_model(text_file, steps=4)
    whole = pretrain(config, tmp_path / "whole")
    seen = []

    def after_step(self: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LanguageModelObjective, "after_step", after_step)
    with pytest.raises(TrainingInterrupted, match="after step 3 of 4"):
        pretrain(config, tmp_path / "parts")
    parts = pretrain(config, tmp_path / "parts", resume=True)
    one, other = (AutoModelForCausalLM.from_pretrained(r.model_folder) for r in (whole, parts))
    assert_equal_weights(one, other)


def test_held_back_documents_are_not_trained_on(text_file: Path) -> None:
    corpus = open_corpus(language_model(text_file))
    trained = {corpus.sources[0][i].id for i in range(corpus.sources[0].length or 0)}
    held = {sample.id for sample in corpus.held_back if sample.turns[0].role == "document"}
    assert held
    assert not held & trained
    named = language_model(text_file, held_out=(SourceConfig(source=str(text_file)),))
    assert open_corpus(named).held_back == []


def test_a_single_document_cannot_be_held_back(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("short")
    config = language_model(path, data=DataConfig(sources=(SourceConfig(source=str(path)),)))
    with pytest.raises(DataError, match="a single document leaves nothing to hold back"):
        pretrain(config, tmp_path / "run")


@lru_cache
def trained(kind: str) -> Any:
    return train_tokenizer(TokenizerConfig(kind=kind, vocabulary_size=300), ["the quick brown fox 123 é"] * 3)


@pytest.mark.parametrize("kind", ["bpe", "characters"])
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30))
def test_tokenizers_lose_nothing(kind: str, text: str) -> None:
    ids = trained(kind)(text, add_special_tokens=False)["input_ids"]
    assert trained(kind).decode(ids) == text or any(token in text for token in COMPACT_SPECIAL_TOKENS)


def test_tokenizers_spell_numbers_and_keep_special_tokens_whole(tmp_path: Path) -> None:
    for kind in ("bpe", "characters"):
        texts = ["answer 1234 1234 1234"] * 50
        tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocabulary_size=300), texts)
        tokenizer.save_pretrained(tmp_path / kind)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4
        for token in COMPACT_SPECIAL_TOKENS:
            assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
        assert tokenizer.image_token == "<|image|>"
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert len(tokenizer("Az~ \n", add_special_tokens=False)["input_ids"]) == 5  # printable ASCII is always in
    joined = train_tokenizer(TokenizerConfig(vocabulary_size=300, split_digits=False), texts)
    assert len(joined("1234", add_special_tokens=False)["input_ids"]) < 4


def test_bad_shapes_and_vocabularies() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), [])
    with pytest.raises(UsageError, match=r"shape\.hiden_size: qwen3 has no such field; did you mean 'hidden_size'"):
        build_decoder({"hiden_size": 32}, tokenizer)
    with pytest.raises(UsageError, match=r"shape\.model_type: unknown 'qwen33'"):
        build_decoder({"model_type": "qwen33"}, tokenizer)
    with pytest.raises(UsageError, match="vocabulary_size: 200 cannot hold 256 bytes"):
        train_tokenizer(TokenizerConfig(vocabulary_size=200), [])
    with pytest.raises(UsageError, match=r"shape\.hiden_size: vit_mae has no such field"):
        build_autoencoder({"hiden_size": 32})
    with pytest.raises(UsageError, match="image_size 50 is no multiple of patch_size 12"):
        build_autoencoder({"image_size": 50})
    with pytest.raises(UsageError, match=r"shape\.model_type: no encoder 'dinov3_vit' to train"):
        build_autoencoder({"model_type": "dinov3_vit"})
    with pytest.raises(UsageError, match="names mask and decoder itself"):
        build_autoencoder({}, config=MaskedAutoencoderConfig(decoder_blocks=3))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_other_decoders_can_be_built(family: str) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), [])
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2} if family == "gpt2" else SHAPE
    model = build_decoder({"model_type": family, **shape}, tokenizer)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)


def autoencoder(**fields: Any) -> PretrainConfig:
    shape = {"image_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    source = SourceConfig(source="generated:shapes", limit=24)
    given_fields = {"shape": shape, "data": DataConfig(sources=(source,)), "steps": 10, "batch_size": 8}
    return PretrainConfig(objective="masked_autoencoder", training=TRAINING, **(given_fields | fields))


def test_masked_autoencoder_trains_and_loads(tmp_path: Path) -> None:
    result = pretrain(autoencoder(smallest_window=32), tmp_path)
    encoder = ViTMAEModel.from_pretrained(result.model_folder)
    assert encoder.embeddings.position_embeddings.std() > 0.1
    from unclipped.encoders.build import load_encoder

    loaded, _ = load_encoder(str(result.model_folder))
    stated = json.loads((result.model_folder / "preprocessor_config.json").read_text())
    assert loaded.spec.mean == pytest.approx(stated["image_mean"])
    assert stated["size"] == {"height": 48, "width": 48}
    assert 0.01 < stated["image_std"][0] < 0.5
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_autoencoder_batches_are_pure_and_windowed() -> None:
    config = autoencoder(smallest_window=24)
    examples = masked_autoencoder_job(config).make_examples(config.stage())
    batch, again = examples.batch(range(8)), examples.batch(range(8))
    parts = [examples.batch(range(4)), examples.batch(range(4, 8))]
    for name in ("pixel_values", "noise"):
        assert torch.equal(batch[name], again[name])
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), batch[name])
    assert batch["pixel_values"].shape == (8, 3, 48, 48)
    assert batch["noise"].shape == (8, 16)
    assert not torch.equal(examples.batch(range(24, 32))["noise"], batch["noise"])
    plain = autoencoder(flip=False)
    fixed = masked_autoencoder_job(plain).make_examples(plain.stage())
    everything = fixed.batch(range(24))["pixel_values"]
    assert everything.mean().abs() < 0.1  # its own mean and standard deviation
    assert abs(everything.std() - 1) < 0.1


def test_autoencoder_needs_images(text_file: Path, tmp_path: Path) -> None:
    config = autoencoder(data=DataConfig(sources=(SourceConfig(source=str(text_file)),)))
    with pytest.raises(DataError, match="hold no image"):
        pretrain(config, tmp_path / "run")
    with pytest.raises(UsageError, match="smallest_window: 99 is larger than the image side of 48 px"):
        pretrain(autoencoder(smallest_window=99), tmp_path / "other")
