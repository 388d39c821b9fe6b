"""Tiny models for tests: a tokenizer, decoder language models of several families, encoders, assembled models.

Everything is built with random weights from a seed and written to a folder, so that tests load it as a user would.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

TEXT = "the a red blue green circle square what is this how many 0 1 2 3 4 5 6 7 8 9 word two three"


def tiny_tokenizer(
    folder: str | Path | None = None, *, compact: bool = True, pad: bool = True, template: str | None = None
) -> Any:
    """A byte-level BPE tokenizer of a few hundred ids; with `compact`, the package's own special tokens and template.

    Without `compact`: only `<|endoftext|>` (end of sequence) and, with `pad`, `<|padding|>`;
    `template` is its chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from unclipped.models.chat import (
        COMPACT_IMAGE_TOKEN,
        COMPACT_SPECIAL_TOKENS,
        COMPACT_TEMPLATE,
        COMPACT_TOKEN_NAMES,
    )

    special = list(COMPACT_SPECIAL_TOKENS) if compact else ["<|endoftext|>", *(["<|padding|>"] if pad else [])]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer=trainer)
    if compact:
        names: dict[str, Any] = {**COMPACT_TOKEN_NAMES, "extra_special_tokens": {"image_token": COMPACT_IMAGE_TOKEN}}
    else:
        names = {"eos_token": "<|endoftext|>", **({"pad_token": "<|padding|>"} if pad else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = COMPACT_TEMPLATE if compact else template
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_text_config(
    family: str = "qwen3", *, vocab_size: int = 300, hidden_size: int = 32, layers: int = 2, **overrides: Any
) -> Any:
    """The configuration of a tiny decoder: qwen3, qwen2, llama, mistral, gemma, gemma2, gemma3_text, granite, gpt2…"""
    from transformers import AutoConfig

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family == "gpt2":
        shape = {
            "vocab_size": vocab_size, "n_embd": hidden_size, "n_layer": layers, "n_head": 4, "n_positions": 512,
            "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        }  # fmt: skip
    if family in ("gemma2", "gemma3_text"):
        shape |= {"sliding_window": 64, "query_pre_attn_scalar": hidden_size // 4}
    if family in ("cohere", "granite", "llama", "mistral", "qwen2", "cohere2"):
        shape.pop("head_dim")
    return AutoConfig.for_model(family, **(shape | overrides))


def tiny_lm(
    folder: str | Path | None = None, family: str = "qwen3", *, seed: int = 0, tokenizer: Any = None, **overrides: Any
) -> Any:
    """A tiny causal language model with a tokenizer (the compact one when none is given), saved into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = tiny_text_config(family, **({"vocab_size": len(tokenizer)} | ids | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the usual start (0.02) gives nearly flat logits: spread them, so that tokens differ
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


def tiny_vision_config(
    family: str = "dinov2", *, hidden_size: int = 32, image_size: int = 16, patch_size: int = 8
) -> Any:
    """The configuration of a tiny vision encoder of a family (dinov2, vit, vit_mae, clip_vision_model…)."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        family,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        **({"mlp_ratio": 2} if family.startswith("dinov2") else {}),
    )


def tiny_encoder(folder: str | Path, family: str = "dinov2", *, seed: int = 0, **shape: Any) -> Path:
    """A tiny vision encoder with random weights, saved into `folder`."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(seed)
    model = AutoModel.from_config(tiny_vision_config(family, **shape)).eval()
    model.save_pretrained(folder)
    return Path(folder)


LLM_FIELDS = ("rope", "rope_theta", "stem", "layers")


def tiny_vlm(
    folder: str | Path,
    vision: str = "llm",
    *,
    family: str = "qwen3",
    connector: str = "mlp(2)",
    seed: int = 0,
    tokenizer: Any = None,
    output: str | Path | None = None,
    patch_size: int = 8,
    lm_overrides: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Assemble a tiny vision-language model under `folder`: -> (model in eval mode, processor, assembly report).

    `vision` is "llm" (the encoder is made from the language model) or a transformers family such as "dinov2".
    With `output` the assembled model is saved there. Further options go to `ModelConfig`, those of `LLM_FIELDS` into
    its `vision`.
    """
    from unclipped.models.assemble import assemble
    from unclipped.models.checkpoint import save_model
    from unclipped.models.config import ModelConfig

    folder = Path(folder)
    tiny_lm(folder / "text", family, seed=seed, tokenizer=tokenizer, **(lm_overrides or {}))
    if vision == "llm":
        made = {name: options.pop(name) for name in LLM_FIELDS if name in options}
        source: Any = {"llm": str(folder / "text"), "patch_size": patch_size, **made}
        options.setdefault("image", {"max_tokens": 64})
    else:
        source = str(tiny_encoder(folder / "vision", vision, seed=seed + 1, patch_size=patch_size))
    config = ModelConfig(vision=source, text=str(folder / "text"), connector=connector, seed=seed, **options)
    model, processor, report = assemble(config)
    model.eval()
    if output is not None:
        save_model(model, processor, output)
    return model, processor, report


@lru_cache(maxsize=1)
def _noise() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)


def tiny_image(height: int = 16, width: int = 16, *, offset: int = 0) -> Any:
    """A Pillow image of fixed noise, height x width px; another `offset` gives another image."""
    from PIL import Image

    return Image.fromarray(_noise()[offset : offset + height, offset : offset + width])
