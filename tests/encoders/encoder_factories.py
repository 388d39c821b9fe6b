"""Tiny members of every encoder family, and how the transformers model itself is called on planes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    IJepaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    ViTConfig,
    ViTMAEConfig,
)

from unclipped.encoders.llm_config import LLMVisionConfig

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SQUARE = {**SHAPE, "image_size": 32, "patch_size": 8}
DECODER = {**SHAPE, "num_key_value_heads": 2, "vocab_size": 96}
MAE_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}

DECODERS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**DECODER, head_dim=16),
    "qwen2": lambda: Qwen2Config(**DECODER),
    "llama": lambda: LlamaConfig(**DECODER),
    "smollm3": lambda: SmolLM3Config(**DECODER, no_rope_layers=[1, 0], pad_token_id=0),
    "gemma": lambda: GemmaConfig(**DECODER, head_dim=16),
    "gemma2": lambda: Gemma2Config(**DECODER, head_dim=16, sliding_window=2),
    "gemma3_text": lambda: Gemma3TextConfig(
        **DECODER, head_dim=16, sliding_window=2, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**DECODER, sliding_window=2),
}

# One tiny configuration for each registered vision family.
VISION: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: Dinov2Config(**SQUARE),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**SQUARE, num_register_tokens=3),
    "dinov3_vit": lambda: DINOv3ViTConfig(**SQUARE, num_register_tokens=4),
    "vit": lambda: ViTConfig(**SQUARE),
    "vit_mae": lambda: ViTMAEConfig(**SQUARE, **MAE_DECODER),
    "ijepa": lambda: IJepaConfig(**SQUARE),
    "siglip_vision_model": lambda: SiglipVisionConfig(**SQUARE),
    "siglip2_vision_model": lambda: Siglip2VisionConfig(**SHAPE, patch_size=8, num_patches=16),
    "clip_vision_model": lambda: CLIPVisionConfig(**SQUARE),
    "unclipped_llm_encoder": lambda: LLMVisionConfig(DECODERS["qwen3"](), patch_size=(8, 8)),
}

# Every family, and the encoder made of each kind of language model, with both stems and both rotary forms.
ALL: dict[str, Callable[[], Any]] = {
    **VISION,
    **{
        f"llm-{name}": lambda decoder=decoder: LLMVisionConfig(decoder(), patch_size=(4, 6), rope_form="penguin")
        for name, decoder in DECODERS.items()
    },
    "llm-convolution": lambda: LLMVisionConfig(
        DECODERS["qwen3"](), patch_size=(8, 4), num_channels=1, stem="convolution", stem_channels=8
    ),
}


def direct_features(model: Any, family: str, plane: Tensor, prefix: int) -> Tensor:
    """Last hidden state (n, hidden) of one image (C, H, W) from the transformers model itself, prefix removed."""
    batch = plane[None]
    if family == "vit_mae":
        # An arbitrary shuffle, undone with the model's own ids: independent of any order that the adapter asks for.
        rows, columns = plane.shape[1] // 8, plane.shape[2] // 8
        output = model(batch, noise=torch.rand(1, rows * columns), interpolate_pos_encoding=True)
        return output.last_hidden_state[0, prefix:][output.ids_restore[0]]
    if family == "siglip2_vision_model":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        patches = torch.from_numpy(convert_image_to_patches(plane.numpy(), 8))
        count, padded = len(patches), len(patches) + 3
        values = torch.zeros(1, padded, patches.shape[1])
        values[0, :count] = patches
        output = model(
            values,
            pixel_attention_mask=(torch.arange(padded) < count).int()[None],
            spatial_shapes=torch.tensor([[plane.shape[1] // 8, plane.shape[2] // 8]]),
        )
        return output.last_hidden_state[0, :count]
    if family in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        return model(batch).last_hidden_state[0, prefix:]
    return model(batch, interpolate_pos_encoding=True).last_hidden_state[0, prefix:]
