"""GGUF files as language models: the folder equals the model that was written, and what cannot be read is named."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from support.tiny_models import tiny_encoder, tiny_lm
from unclipped.cli.app import app
from unclipped.core.errors import CheckpointError
from unclipped.encoders.importing.gguf import folder_of_gguf
from unclipped.models.language import load_language_model, load_tokenizer

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_gguf(path: Path, *, architecture: str = "llama", tokenizer: bool = True, parts: int = 1) -> Any:
    """A tiny llama with a byte-level tokenizer as a GGUF file in float32; returns the model that was written."""
    model = tiny_lm(path.parent / f"source-{path.stem}", "llama", vocab_size=300)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_string("general.license", "apache-2.0")
    if parts > 1:
        writer.add_uint16("split.count", parts)
    if tokenizer:
        from tokenizers.pre_tokenizers import ByteLevel

        characters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab", *sorted(ByteLevel.alphabet())]
        tokens = characters + [f"filler-{number}" for number in range(config.vocab_size - len(characters))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if (key := name.split(".")[-2]) in heads:  # llama.cpp keeps the pairs of rotary dimensions next to each other
            rows, columns = values.shape
            values = (
                values.reshape(heads[key], 2, rows // heads[key] // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            )
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_the_model_that_was_written(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "lm.gguf")
    loaded, folder = load_language_model(str(tmp_path / "lm.gguf"), "float32")
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(input_ids=ids).logits, written(input_ids=ids).logits)
    assert not hasattr(loaded.config, "quantization_config")
    assert load_tokenizer(folder).chat_template == TEMPLATE
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert folder_of_gguf(tmp_path / "lm.gguf") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps  # made once


def test_assembled_from_a_gguf_file_as_text_and_as_encoder(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "lm.gguf")
    tiny_encoder(tmp_path / "vit", "dinov2", patch_size=8)
    for vision in (str(tmp_path / "vit"), f"llm:{tmp_path / 'lm.gguf'}"):
        output = tmp_path / f"model-{vision[:3].strip('/')}"
        done = CliRunner().invoke(
            app, ["assemble", "--vision", vision, "--text", str(tmp_path / "lm.gguf"), "--output", str(output)]
        )
        assert done.exit_code == 0, done.output
        from unclipped.models.checkpoint import load_model

        model, _ = load_model(output)
        ids = torch.arange(12)[None]
        assert torch.equal(model(input_ids=ids).logits[..., :300], written(input_ids=ids).logits)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good.gguf"
    write_gguf(good)
    for name in ("cut", "header", "count", "empty", "text"):
        shutil.copy(good, tmp_path / f"{name}.gguf")
    cut(tmp_path / "cut.gguf", 0.6)
    cut(tmp_path / "header.gguf", 0.01)
    content = bytearray(good.read_bytes())
    content[8:16] = struct.pack("<Q", 2**60)  # a tensor count beyond every file
    (tmp_path / "count.gguf").write_bytes(content)
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("no model")
    write_gguf(tmp_path / "foreign.gguf", architecture="mamba7")
    write_gguf(tmp_path / "wordless.gguf", tokenizer=False)
    write_gguf(tmp_path / "part.gguf", parts=2)
    shutil.copy(good, tmp_path / "model-00001-of-00002.gguf")
    expected = {
        "missing": "no such file",
        "cut": "cannot be read",
        "header": "cannot be read",
        "count": "cannot be read",
        "empty": "no GGUF file",
        "text": "no GGUF file",
        "foreign": "mamba7",
        "wordless": "no tokenizer",
        "part": "one part of a split file",
        "model-00001-of-00002": "one part of a split file",
    }
    for name, words in expected.items():
        with pytest.raises(CheckpointError) as caught:
            load_language_model(str(tmp_path / f"{name}.gguf"), "float32")
        assert words in str(caught.value), (name, str(caught.value))
        assert str(caught.value).startswith(str(tmp_path / f"{name}.gguf")), str(caught.value)
        assert "\n" not in str(caught.value)
