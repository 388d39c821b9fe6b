"""Assembled folders: written whole or not at all, loaded strictly; connectors saved by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from unclipped.attention.syntax import parse_pattern
from unclipped.connectors.build import Connector
from unclipped.core.documents import read_json
from unclipped.core.errors import CheckpointError, UsageError
from unclipped.core.files import is_empty_folder, whole_folder
from unclipped.encoders.checkpoint import checkpoint_folder, load_weights, quiet, raise_misfits, read_config
from unclipped.encoders.folder_check import reading
from unclipped.encoders.weights import read_safetensors
from unclipped.models.image_processing import UnclippedImageProcessor
from unclipped.models.language import raise_loading_misfits
from unclipped.models.modeling import UnclippedForConditionalGeneration
from unclipped.models.processing import UnclippedProcessor
from unclipped.models.register import register

CONNECTOR_WEIGHTS = "connector.safetensors"
CONNECTOR_CONFIG = "connector.json"


def load_model(
    folder: str | Path, *, dtype: torch.dtype | str = "auto"
) -> tuple[UnclippedForConditionalGeneration, UnclippedProcessor]:
    """An assembled folder (or hub id): -> (model in evaluation mode, processor).

    Raises CheckpointError when it is no assembled model, or lists the tensors that are missing, extra or misshaped.
    """
    register()
    path = checkpoint_folder(folder)
    config = read_config(path)
    if config.model_type != "unclipped":
        raise CheckpointError(
            f"{folder}: holds a '{config.model_type}', not an assembled model; "
            "make one with `unclipped assemble --vision … --text … --output DIR`"
        )
    model, info = load_weights(UnclippedForConditionalGeneration, path, config, dtype=dtype)
    raise_loading_misfits(str(folder), info)
    processor = _load_processor(path)
    _check_together(path, model, processor)
    return model.eval(), processor


def _check_together(folder: Path, model: UnclippedForConditionalGeneration, processor: UnclippedProcessor) -> None:
    """Raise CheckpointError when the files of a folder speak of different tokens: answers would be wrong in silence."""
    remedy = "copy all files of one model"
    expected, found = model.config.image_token_id, processor.image_token_id
    if expected != found:
        raise CheckpointError(
            f"{folder}: config.json has image_token_id {expected}, the processor's image token "
            f"'{processor.image_token}' is {found}; {remedy}"
        )
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if len(processor.tokenizer) > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(processor.tokenizer)} tokens, the model {rows}; {remedy}"
        )
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens"):
        value: Any = getattr(model.generation_config, name)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < rows:
                raise CheckpointError(
                    f"{folder / 'generation_config.json'}: {name}: {token!r} is no token of the model, which has "
                    f"{rows}; {remedy}"
                )


def _load_processor(folder: Path) -> UnclippedProcessor:
    """The processor of an assembled folder. Raises CheckpointError that names the files it needs."""
    needed = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
    remedy = f"a model folder needs {', '.join(needed)} beside the weights: copy all files, or save it again"
    if absent := [name for name in needed if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: no processor, {' and '.join(absent)} missing; {remedy}")
    with reading(folder, "the processor cannot be read", remedy), quiet():
        processor = UnclippedProcessor.from_pretrained(folder, trust_remote_code=False)
        processor.tokenizer("a")  # a damaged tokenizer.json may load, and fail when it is used
    if not isinstance(processor.image_processor, UnclippedImageProcessor):
        found = type(processor.image_processor).__name__
        raise CheckpointError(f"{folder}: expected an UnclippedImageProcessor, found a {found}; {remedy}")
    return processor


def save_model(
    model: UnclippedForConditionalGeneration,
    processor: UnclippedProcessor | None,
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write model and processor to a temporary folder beside `folder`, then rename: nobody sees half a model.

    Raises UsageError when `folder` holds something and `overwrite` is false, UnclippedError when it cannot be written.
    """
    tower = model.model.vision_tower  # its attention and tiles may have been set after it was built
    given, stated = tower.pattern and tower.pattern.given, model.config.vision_attention
    if given is None or stated is None or parse_pattern(stated) != given:  # else the text stays as it was written
        model.config.vision_attention = None if given is None else str(given)
    model.config.vision_tile = None if tower.tile is None else list(tower.tile)
    with _whole_folder(Path(folder), overwrite) as temporary, quiet():
        model.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
    return Path(folder)


def save_connector(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the connector alone: its weights, its text form and its widths. Raises as `save_model`."""
    connector = _connector_of(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in connector.state_dict().items()}
    with _whole_folder(Path(folder), overwrite) as temporary:
        save_file(tensors, temporary / CONNECTOR_WEIGHTS)
        description = json.dumps(_describe(connector), indent=2) + "\n"
        (temporary / CONNECTOR_CONFIG).write_text(description, encoding="utf-8")
    return Path(folder)


def load_connector(model: nn.Module, folder: str | Path) -> None:
    """Load a connector written by `save_connector` into the model, strictly.

    Raises CheckpointError that names the field or tensors when it was made for another model.
    """
    path = Path(folder)
    connector = _connector_of(model)
    remedy = f"expected {CONNECTOR_CONFIG} and {CONNECTOR_WEIGHTS} as `save_connector` writes them"
    if absent := [name for name in (CONNECTOR_CONFIG, CONNECTOR_WEIGHTS) if not (path / name).is_file()]:
        raise CheckpointError(f"{folder}: no readable connector, {' and '.join(absent)} missing; {remedy}")
    stored: dict[str, Any] = read_json(path / CONNECTOR_CONFIG, error=CheckpointError, remedy=remedy)
    tensors = read_safetensors(path / CONNECTOR_WEIGHTS)
    for field, wanted in _describe(connector).items():
        if stored.get(field) != wanted:
            raise CheckpointError(
                f"{path / CONNECTOR_CONFIG}: {field} is {stored.get(field)!r}, the model's connector has {wanted!r}; "
                "assemble the model with the same encoder, language model and connector"
            )
    state = connector.state_dict()
    raise_misfits(
        str(path / CONNECTOR_WEIGHTS),
        [name for name in state if name not in tensors],
        [name for name in tensors if name not in state],
        [
            f"{name} (found {tuple(tensors[name].shape)}, expected {tuple(state[name].shape)})"
            for name in state
            if name in tensors and tensors[name].shape != state[name].shape
        ],
    )
    connector.load_state_dict(tensors)


def _connector_of(model: nn.Module) -> Connector:
    for module in model.modules():
        if isinstance(module, Connector):
            return module
    raise UsageError(f"{type(model).__name__} has no connector")


def _describe(connector: Connector) -> dict[str, Any]:
    return {
        "connector": str(connector.config),
        "vision_hidden": connector.vision_hidden,
        "text_hidden": connector.text_hidden,
    }


@contextmanager
def _whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it does not."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file, not a folder")
    if folder.is_dir() and not is_empty_folder(folder) and not overwrite:
        raise UsageError(f"{folder}: is not empty; choose another folder or remove it")
    with whole_folder(folder) as temporary:
        yield temporary
