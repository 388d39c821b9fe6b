"""What is timed: our models with a large image, or text-only decoders with random tokens."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclipped.attention.layout import Layout
from unclipped.attention.prefill import decoder_of
from unclipped.core.errors import UsageError
from unclipped.data.sample import ImagePart, Sample
from unclipped.evaluation.sparse.config import SHAPES, BenchConfig
from unclipped.evaluation.sparse.scaling import layer_shape
from unclipped.inference.engine import Engine, find_device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TEXT = 64  # tokens of text before and behind the visual ones of a decoder's random prompt
_COLUMNS = 64


@dataclass(frozen=True, eq=False)
class Input:
    """What a prefill is called with, its layout, and how long the parts before it took."""

    arguments: dict[str, Any]
    layout: Layout
    parts: dict[str, float]
    """Seconds of decode, encoder and connector; empty for a decoder."""
    visual_tokens: int

    @property
    def tokens(self) -> int:
        return self.layout.length


@dataclass(frozen=True, eq=False)
class Subject:
    """A model on its device, and how a prompt of about so many tokens is made."""

    model: Any
    device: torch.device
    make: Callable[[int], Input]

    @property
    def shape(self) -> dict[str, int]:
        return layer_shape(decoder_of(self.model))


def synchronise(device: torch.device) -> None:
    """Wait for a device that computes on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of `run` and its seconds."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return result, time.perf_counter() - start


def open_subject(config: BenchConfig) -> Subject:
    """The model of a benchmark. Raises UsageError for `layers` with a saved model, CheckpointError as loading does."""
    device = find_device(config.device)
    if config.model in SHAPES:
        return _decoder(_random_decoder(config), device, config)
    if config.layers is not None:
        raise UsageError(f"layers: only shapes ({', '.join(SHAPES)}) can be cut; {config.model} is timed as it is")
    if not Path(config.model).is_dir():
        raise UsageError(f"{config.model}: neither a model folder nor a shape; shapes: {', '.join(SHAPES)}")
    from unclipped.encoders.checkpoint import checkpoint_folder, read_config

    kind = read_config(checkpoint_folder(config.model)).model_type
    dtype = _DTYPES.get(config.dtype, "auto")
    if kind == "unclipped":
        from unclipped.models.checkpoint import load_model

        model, processor = load_model(config.model, dtype=dtype)
        engine = Engine(model, processor, device=config.device)
        return Subject(engine.model, device, lambda tokens: _with_image(engine, tokens, config.seed))
    from unclipped.models.language import load_language_model

    model, _ = load_language_model(config.model, dtype)
    return _decoder(model, device, config)


def _random_decoder(config: BenchConfig) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPES[config.model]
    settings = Qwen3Config(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=config.layers or shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"],
        head_dim=128,
        vocab_size=1024,  # one row of logits is computed: a large vocabulary would only take memory
        max_position_embeddings=2 * max(config.tokens),
        tie_word_embeddings=True,
    )
    torch.manual_seed(config.seed)
    model: Any = Qwen3ForCausalLM(settings)
    return model.to(_DTYPES.get(config.dtype, torch.bfloat16))


def _decoder(model: Any, device: torch.device, config: BenchConfig) -> Subject:
    model = model.to(device).eval()
    return Subject(model, device, lambda tokens: _random_prompt(model, tokens, config.seed))


def _random_prompt(model: Any, tokens: int, seed: int) -> Input:
    """Random ids; all but 64 before and 64 behind (or a quarter of a short prompt) count as one image."""
    check_positions(model, tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=generator)
    text = min(_TEXT, tokens // 8)
    columns = min(_COLUMNS, math.isqrt(tokens))
    rows = (tokens - 2 * text) // columns
    types = [0] * text + [1] * (rows * columns) + [0] * (tokens - text - rows * columns)
    layout = Layout.from_token_types(types, [(1, rows, columns)])
    device = next(model.parameters()).device
    return Input({"input_ids": ids.to(device)}, layout, {}, rows * columns)


def check_positions(model: Any, tokens: int) -> None:
    """Raise UsageError when the model has fewer positions than a prompt has tokens."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise UsageError(f"tokens: a prompt of {tokens} tokens is longer than the model's {most} positions; time fewer")


def _with_image(engine: Engine, tokens: int, seed: int) -> Input:
    """One noise image of about `tokens` visual tokens under a native rule, or copies of the fixed size; each part of
    its way to the language model is timed."""
    processor, model, device = engine.processor, engine.model, engine.device
    rule = processor.image_processor.image_rule
    if rule.size is None and rule.fixed_height is None:
        rows = max(1, math.isqrt(tokens))
        size, copies = (rows * rule.block[0], tokens // rows * rule.block[1]), 1
    else:
        size = rule.size or (rule.fixed_height, rule.fixed_height * rule.max_tokens)
        per_image = int(processor.num_image_tokens(torch.tensor([[1, *processor.image_processor.grid_of(*size)]]))[0])
        copies = max(1, round(tokens / per_image))
    image = _noise_png(size, seed)
    sample = Sample.qa("benchmark", tuple(ImagePart(image, name="noise") for _ in range(copies)), "what?", "")
    before = rule.max_tokens
    processor.image_processor.max_tokens = max(before, tokens)
    try:
        prompt, decode_seconds = timed(lambda: engine.encode(sample), device)
    finally:
        processor.image_processor.max_tokens = before
    check_positions(model, len(prompt.input_ids) + 1)
    assert prompt.pixel_values is not None
    assert prompt.image_grid_thw is not None
    pixels, grid = prompt.pixel_values.to(device, model.dtype), prompt.image_grid_thw.to(device)
    with torch.inference_mode():
        features, encoder_seconds = timed(lambda: model.model.vision_tower(pixels, grid), device)
        (placed, out_grid), connector_seconds = timed(lambda: model.model.connector(features, grid), device)
    from unclipped.models.modeling import ImageFeatures

    images = ImageFeatures(
        last_hidden_state=features,
        pooler_output=list(placed.split(out_grid.prod(dim=1).tolist())),  # type: ignore[arg-type]
        image_grid_thw=out_grid,
        pixel_values=pixels,
        patch_grid_thw=grid,
    )
    ids = torch.tensor([prompt.input_ids], device=device)
    grids = [(int(t), int(h), int(w)) for t, h, w in out_grid.tolist()]
    layout = Layout.from_input_ids(ids[0], model.config.image_token_id, grids)
    parts = {"decode": decode_seconds, "encoder": encoder_seconds, "connector": connector_seconds}
    return Input({"input_ids": ids, "mm_encoder_outputs": {"image": images}}, layout, parts, len(placed))


def _noise_png(size: tuple[int, int], seed: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def layer_states(subject: Subject, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query (1, H, N, d), key and value (1, Hkv, N, d) of a layer's shape, in the model's precision."""
    shape = subject.shape
    generator = torch.Generator().manual_seed(seed)
    counts = (shape["heads"], shape["key_heads"], shape["key_heads"])
    query, key, value = (
        torch.randn(1, count, tokens, shape["head_dim"], generator=generator).to(subject.device, subject.model.dtype)
        for count in counts
    )
    return query, key, value
