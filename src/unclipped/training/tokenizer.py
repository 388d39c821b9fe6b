"""Tokenizers for language models trained from nothing: byte-level BPE, or one token a character."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unclipped.core.errors import UsageError
from unclipped.models.chat import COMPACT_IMAGE_TOKEN, COMPACT_SPECIAL_TOKENS, COMPACT_TEMPLATE, COMPACT_TOKEN_NAMES
from unclipped.models.language import load_tokenizer
from unclipped.training.config import TokenizerConfig

_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Any:
    """A tokenizer with the compact chat template and its special tokens (end of text, padding, image, roles).

    Any text survives encoding and decoding: BPE works on bytes, and a character outside the alphabet is spelt in byte
    tokens. Raises UsageError when the vocabulary cannot hold bytes and special tokens, CheckpointError when there is no
    tokenizer at `source`.
    """
    if config.source is not None:
        return load_tokenizer(config.source, f"tokenizer.source {config.source}")
    backend = _bpe(config, texts) if config.kind == "bpe" else _characters(config, texts)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": COMPACT_IMAGE_TOKEN},
        **COMPACT_TOKEN_NAMES,
    )
    tokenizer.chat_template = COMPACT_TEMPLATE
    return tokenizer


def _bpe(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    smallest = 256 + len(COMPACT_SPECIAL_TOKENS)
    if config.vocabulary_size < smallest:
        raise UsageError(
            f"tokenizer.vocabulary_size: {config.vocabulary_size} cannot hold 256 bytes and "
            f"{len(COMPACT_SPECIAL_TOKENS)} special tokens; use at least {smallest}"
        )
    backend = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if config.split_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, by_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size,
        special_tokens=list(COMPACT_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def _characters(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    always = string.printable[:95] + "\n\t"
    found = config.characters if config.characters is not None else {c for text in texts for c in text}
    alphabet = dict.fromkeys([*always, *sorted(set(found))])
    vocabulary = {token: index for index, token in enumerate([*COMPACT_SPECIAL_TOKENS, *alphabet, *_BYTES])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))  # no merge: characters stay alone
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in COMPACT_SPECIAL_TOKENS])
    return backend
