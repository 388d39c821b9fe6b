"""GGUF files (llama.cpp's format) as ordinary folders of transformers, de-quantised to float32.

transformers reads the file; what it makes of one keeps a mark of the quantisation and cannot be saved, so that the
tensors move into a model of the same configuration without that mark.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unclipped.core.digest import file_digest
from unclipped.core.errors import CheckpointError, UsageError, guarded
from unclipped.core.files import cache_folder, whole_folder, write_text
from unclipped.encoders.checkpoint import checkpoint_folder, quiet, raise_misfits
from unclipped.encoders.folder_check import reading

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_REMEDY = "fetch the file again, or give the model's folder or hub id"


def language_model_folder(source: str | Path) -> Path:
    """The local folder of a language model: that of a folder, a hub id or a GGUF file.

    Raises as `checkpoint_folder` and `folder_of_gguf`.
    """
    return folder_of_gguf(source) if str(source).lower().endswith(SUFFIX) else checkpoint_folder(source)


def folder_of_gguf(source: str | Path) -> Path:
    """The folder (config.json, safetensors, tokenizer) of a GGUF file, made once for each content and kept in a cache.

    It takes four bytes a weight on disk. Raises UsageError when the package gguf is not installed, CheckpointError for
    a file that is missing, cut, one part of several, without a tokenizer, or of a family that transformers cannot read.
    """
    path = Path(source).expanduser()
    _check_file(path)
    digest, _ = file_digest(path)  # of the whole file, since files of one size may differ anywhere
    folder = cache_folder("gguf") / digest
    if not (folder / "config.json").is_file():
        convert_gguf(path, folder)
    return folder


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model folder of a GGUF file, whole or not at all. Raises as `folder_of_gguf`."""
    _check_file(path)
    with whole_folder(folder) as temporary:
        _convert(path, temporary)


def _check_file(path: Path) -> None:
    """Raise CheckpointError for what is no whole GGUF file, as far as its name and first bytes say."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a GGUF file, a model folder or a hub id")
    if _PART.search(path.name):
        raise CheckpointError(f"{path}: is one part of a split file; join the parts (llama-gguf-split --merge)")
    with open(path, "rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{path}: is no GGUF file (its first bytes are not 'GGUF'); {_REMEDY}")


def _convert(path: Path, folder: Path) -> None:
    """Write the folder of one file."""
    fields = _fields(path)
    if fields.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path}: is one part of a split file; join the parts (llama-gguf-split --merge)")
    if "tokenizer.ggml.tokens" not in fields:
        raise CheckpointError(f"{path}: holds no tokenizer; give a file made with its vocabulary")
    with reading(path, "transformers cannot read this GGUF file", _REMEDY), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    model, info = loaded
    misshaped = [str(name) for name in info["mismatched_keys"]]
    raise_misfits(str(path), sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), misshaped, remedy=_REMEDY)
    with reading(path, "its tokenizer cannot be read", _REMEDY), quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    config = model.config
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with quiet():
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if isinstance(licence := fields.get("general.license"), str):
        write_text(folder / "README.md", f"---\nlicense: {licence}\n---\n")


def _fields(path: Path) -> dict[str, Any]:
    """The file's own description, arrays left out but for the token list's name."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError(f"{path}: reading GGUF files needs a package; pip install 'unclipped[gguf]'") from None
    with guarded(lambda reason: CheckpointError(f"{path}: cannot be read as GGUF ({reason}); {_REMEDY}")):
        reader = GGUFReader(path)
        simple = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
        return simple | {name: True for name, field in reader.fields.items() if len(field.types) > 1}
