"""A small decoder language model and its tokenizer, from text files and text-only samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from unclipped.core.errors import DataError, UsageError, guarded
from unclipped.core.files import whole_folder
from unclipped.data.config import DataConfig
from unclipped.data.mixture import Mixture
from unclipped.data.sample import Sample, SampleGroup
from unclipped.data.sources import SelectedSource, Source, open_sources
from unclipped.encoders.checkpoint import quiet
from unclipped.encoders.given_config import check_fields, config_from_fields, known_config
from unclipped.encoding.control_tokens import Piece
from unclipped.encoding.examples import position_limit
from unclipped.encoding.text import TokenBlocks, build_token_blocks, render_documents
from unclipped.objectives.language_model import LanguageModelObjective
from unclipped.training import measure
from unclipped.training.batches import Examples
from unclipped.training.config import PretrainConfig
from unclipped.training.examples import MixtureExamples
from unclipped.training.stages import Job
from unclipped.training.text import TextBlocks, blocks_of, held_out_blocks
from unclipped.training.tokenizer import train_tokenizer

_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_HELD_BACK_EVERY = 50
_UNREACHED = 1 << 40
"""First sample of an endless source that serves as held-out text; no training run comes that far."""


def build_decoder(shape: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    """A decoder with fresh weights. `shape`: `model_type` (qwen3) and fields of its configuration.

    Fields that are not given are those of a model of about a million parameters. Raises UsageError for a model type or
    a field that transformers does not know.
    """
    fields = dict(shape)
    model_type = fields.pop("model_type", "qwen3")
    known = known_config(model_type, "shape")
    check_fields(known, fields, "shape")
    aliases = getattr(known, "attribute_map", {})  # some families call these fields otherwise, as in n_embd
    small = {name: value for name, value in _SMALL.items() if hasattr(known, name) and aliases.get(name) not in fields}
    merged = small | fields
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if hasattr(known, "head_dim") and "head_dim" not in fields:
        width, heads = merged.get("hidden_size"), merged.get("num_attention_heads")
        if isinstance(width, int) and isinstance(heads, int):
            merged["head_dim"] = width // heads
    config = config_from_fields(model_type, merged | special | {"vocab_size": len(tokenizer)}, "shape")
    with guarded(lambda reason: UsageError(f"shape: no {model_type} can be built from these fields ({reason})")):
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # sizes that do not fit each other may show only here
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class BlockExamples:
    """Example i is block i of the corpus; every token after the first is predicted."""

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks = blocks

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`input_ids` and `labels`, int64 (batch, block length), and the blocks' numbers."""
        ids = torch.from_numpy(np.stack([self.blocks.block(index) for index in indices]))  # (batch, length)
        return {"input_ids": ids, "labels": ids.clone(), "sample_ids": [f"block {index}" for index in indices]}

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """All blocks are equally long."""
        return [self.blocks.block_length] * len(indices)


@dataclass
class Corpus:
    """Training sources without the part that is held back, and that part."""

    config: DataConfig
    sources: list[Source]
    held_back: list[Sample]
    seed: int

    def mixture(self) -> Mixture:
        return Mixture(self.config, self.seed, sources=self.sources)


def open_corpus(config: PretrainConfig) -> Corpus:
    """Open the sources; unless `held_out` names text, hold back every fiftieth sample of each finite source.

    Of endless sources, samples are taken that training never reaches.
    """
    seed = config.training.seed if config.data.seed is None else config.data.seed
    sources: list[Source] = []
    held_back: list[Sample] = []
    for source in open_sources(config.data, seed=seed):
        if not config.held_out and source.length is not None and source.length > 1:
            is_held = np.arange(source.length) % _HELD_BACK_EVERY == min(_HELD_BACK_EVERY, source.length) - 1
            most = config.held_out_blocks * config.block_length  # a document holds at least one token
            held_back += [source[int(index)] for index in np.flatnonzero(is_held)[:most]]
            source = SelectedSource(source, np.flatnonzero(~is_held), name=source.name)
        elif not config.held_out and source.length is None:
            held_back += [source[_UNREACHED + index] for index in range(8 * config.held_out_blocks)]
        sources.append(source)
    return Corpus(config.data, sources, held_back, seed)


def _samples(mixture: Mixture, most: int) -> Iterator[Sample]:
    """One pass over a finite mixture, and in any case no more than `most` draws."""
    for index in range(most if mixture.length is None else min(mixture.length, most)):
        item = mixture.sample(index)
        yield from item.samples if isinstance(item, SampleGroup) else (item,)


def language_model_job(config: PretrainConfig) -> Job:
    """Train the tokenizer, build the decoder and describe the training. Raises UsageError and DataError."""
    corpus = open_corpus(config)
    texts = (part for sample in _samples(corpus.mixture(), config.tokenizer.documents) for part in _texts(sample))
    tokenizer = train_tokenizer(config.tokenizer, texts)
    torch.manual_seed(config.training.seed)
    model = build_decoder(config.shape, tokenizer)
    limit = position_limit(model)
    if limit is not None and config.block_length > limit:
        raise UsageError(
            f"block_length: rows of {config.block_length} tokens do not fit in the {limit} positions of the shape; "
            "lower it, or raise shape.max_position_embeddings"
        )
    held_out = _held_out(config, corpus, tokenizer)

    def save(folder: Path) -> None:
        with whole_folder(folder) as temporary, quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

    return Job(
        model=model,
        make_objective=lambda stage, carried: LanguageModelObjective(model),
        make_examples=lambda stage: _examples(config, corpus, tokenizer),
        save=save,
        measure_text=lambda: measure.text_perplexity(model, held_out.blocks, bytes_per_block=held_out.bytes_per_block),
    )


def _examples(config: PretrainConfig, corpus: Corpus, tokenizer: Any) -> Examples:
    mixture = corpus.mixture()
    if config.rows == "samples":
        return MixtureExamples(mixture, tokenizer, max_length=config.block_length)
    wanted = min(config.prepared_tokens, (config.steps + 1) * config.batch_size * config.block_length)
    return BlockExamples(
        build_token_blocks(
            _documents(mixture, tokenizer, wanted), tokenizer, config.block_length, seed=config.training.seed
        )
    )


def _documents(mixture: Mixture, tokenizer: Any, wanted_tokens: int) -> Iterator[tuple[Piece, ...]]:
    """Rendered documents until about `wanted_tokens` tokens are there, or a finite mixture has been gone through."""
    characters, tokens_per_character = 0, 1.0
    for number, pieces in enumerate(render_documents(_samples(mixture, wanted_tokens), tokenizer)):
        yield pieces
        text = "".join(text for text, _ in pieces)
        characters += len(text)
        if number < 64:  # the rate of the first documents is enough to know when to stop
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens_per_character = max(0.05, len(ids) / max(1, len(text)))
        if characters * tokens_per_character >= wanted_tokens:
            return


def _texts(sample: Sample) -> Iterator[str]:
    for turn in sample.turns:
        if turn.text:
            yield turn.text


def _held_out(config: PretrainConfig, corpus: Corpus, tokenizer: Any) -> TextBlocks:
    count, length = config.held_out_blocks, config.block_length
    if config.held_out:
        return held_out_blocks(config.held_out, tokenizer, count, length=length, seed=corpus.seed)
    if not corpus.held_back:
        raise DataError(
            "data: a single document leaves nothing to hold back; give held_out, more text, or a smaller "
            "options.document_characters of the source"
        )
    return blocks_of((sample.without_images() for sample in corpus.held_back), tokenizer, count, length)
