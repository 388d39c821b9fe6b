"""The language model's side of assembly: strict loading, its tokenizer, an image token, a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from unclipped.core.bounded import rendered
from unclipped.core.documents import read_json
from unclipped.core.errors import CheckpointError, guarded
from unclipped.encoders.checkpoint import load_weights, quiet, raise_misfits, read_config
from unclipped.encoders.folder_check import check_folder, reading
from unclipped.encoders.importing.gguf import language_model_folder
from unclipped.models.chat import default_template, knows_images, with_images

# Image tokens that tokenizers are known to bring; the first that is there is taken, else the last is added.
IMAGE_TOKENS = ("<|image|>", "<|image_pad|>", "<image_soft_token>", "<image>")

# Classes that are nothing but their tokenizer.json.
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class TokenizerNotes:
    """What was decided about the tokenizer, for the report."""

    image_token: str
    image_token_added: bool
    pad_token: str
    template: str
    """"own", "own, adapted to images", or "default"."""


def load_language_model(source: str, dtype: torch.dtype | str) -> tuple[Any, Path]:
    """A causal language model with all its weights, in evaluation mode, and its folder.

    Raises CheckpointError when the folder is no text-only decoder or a tensor is missing, extra or misshaped.
    """
    folder = language_model_folder(source)
    config = read_config(folder)
    if getattr(config, "vision_config", None) is not None or config.is_encoder_decoder:
        raise CheckpointError(
            f"{source}: '{config.model_type}' is not a text-only decoder; give a causal language model such as Qwen3"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{source}: transformers has no causal language model of type '{config.model_type}'; "
            "give a decoder such as Qwen3, Llama or Gemma"
        )
    model, info = load_weights(AutoModelForCausalLM, folder, config, dtype=dtype)
    raise_loading_misfits(source, info)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise CheckpointError(
            f"{source}: the output layer of '{config.model_type}' is not linear; it cannot be taken over"
        )
    return model.eval(), folder


def raise_loading_misfits(where: str, info: dict[str, Any]) -> None:
    """Raise CheckpointError listing what transformers found missing, unexpected or misshaped."""
    shapes = {
        name: f"{name} (found {tuple(found)}, expected {tuple(expected)})"
        for name, found, expected in info["mismatched_keys"]
    }
    raise_misfits(
        where,
        [name for name in sorted(info["missing_keys"]) if name not in shapes],
        sorted(info["unexpected_keys"]),
        [shapes[name] for name in sorted(shapes)],
    )


def load_tokenizer(source: str | Path, where: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises CheckpointError when there is none, or it wants to run code."""
    folder = Path(source).expanduser()
    remedy = "expected tokenizer.json and tokenizer_config.json in a folder, or a hub id when there is a network"
    loader: Any = AutoTokenizer
    if folder.is_dir():
        check_folder(folder)
        stated = folder / "tokenizer_config.json"
        if not stated.is_file():  # transformers would make one up from the model's type
            raise CheckpointError(f"{where or source}: no usable tokenizer ({stated.name} is missing); {remedy}")
        if read_json(stated, error=CheckpointError).get("tokenizer_class") in GENERIC_TOKENIZERS:
            # For some model types (Qwen2) transformers would put its own class and splitting rules in place of these.
            loader = PreTrainedTokenizerFast
    with reading(where or source, "no usable tokenizer", remedy), quiet():
        tokenizer: Any = loader.from_pretrained(folder if folder.is_dir() else source, trust_remote_code=False)
        tokenizer("a")  # a damaged tokenizer.json may load, and fail when it is used
    return cast("PreTrainedTokenizerBase", tokenizer)


def prepare_tokenizer(tokenizer: Any, where: str) -> TokenizerNotes:
    """Give the tokenizer an image token, a padding token and a chat template that understands images, in place.

    A tokenizer without a padding token pads with its end-of-sequence token (labels are built, not found by searching
    for padding, so the two cannot be confused). One without a chat template gets the default of `models.chat`. Raises
    CheckpointError when there is no end-of-sequence token either.
    """
    if tokenizer.eos_token is None:
        raise CheckpointError(f"{where}: the tokenizer names no eos_token, so an answer could not end; name one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = tokenizer.get_added_vocab()
    token = getattr(tokenizer, "image_token", None) or next((token for token in IMAGE_TOKENS if token in known), None)
    added = token is None
    if token is None:
        token = IMAGE_TOKENS[-1]
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    template, note = tokenizer.chat_template, "own"
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        template = default_template(
            token, eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token if adds_bos else None
        )
        note = "default"
    elif not knows_images(template, token, where):
        template, note = with_images(template, token), "own, adapted to images"
        if not knows_images(template, token, where):
            raise CheckpointError(
                f"{where}: its chat template drops or changes the text of a message, so images cannot be placed; "
                "remove chat_template from the tokenizer to get the default one"
            )
    tokenizer.chat_template = template
    return TokenizerNotes(token, added, tokenizer.pad_token, note)


def fit_vocabulary(model: Any, tokenizer: Any) -> int:
    """Add rows to the token embedding and the output layer for new tokens; returns how many.

    The rows that were there, and the logits they give, stay as they are.
    """
    before = model.get_input_embeddings().weight.shape[0]
    added = max(0, len(tokenizer) - before)
    if added:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return added


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's end of sequence, and the template's own when it is another."""
    ids = [tokenizer.eos_token_id]
    mark = "an-answer"
    messages = [{"role": "user", "content": "a-question"}, {"role": "assistant", "content": mark}]
    what = f"chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    with guarded(lambda reason: CheckpointError(f"{what}: fails for a question and its answer ({reason}); repair it")):
        text = rendered(what, lambda: tokenizer.apply_chat_template(messages, tokenize=False), CheckpointError)
    after = tokenizer.encode(text.rpartition(mark)[2], add_special_tokens=False)
    if after and after[0] in set(tokenizer.get_added_vocab().values()) and after[0] not in ids:
        ids.append(after[0])
    return ids


@torch.no_grad()
def probe_logits(model: Any, vocabulary: int) -> Tensor:
    """Logits (1, 8, vocabulary) of a fixed text, to compare a language model before and after assembly."""
    ids = torch.arange(8, device=model.device)[None] * 7 % vocabulary
    return model(input_ids=ids, use_cache=False).logits[..., :vocabulary]
