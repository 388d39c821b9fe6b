"""What transformers calls the tensors of original DINOv2, Web-SSL and MAE files.

Names and order of parts: the published code of DINOv2 (arXiv 2304.07193) and MAE (arXiv 2111.06377). There query, key
and value are one matrix, as are the gate and the value of a SwiGLU.
"""

from __future__ import annotations

Source = tuple[str, int, int]
"""Original name, and which of how many equal parts of its rows."""


def trunk_sources(depth: int, *, is_vit: bool, is_gated: bool) -> dict[str, Source]:
    """The encoder's names in a ViTModel, or else in a Dinov2Model with or without registers, and what they come from.

    More than one model has is named: mask token, registers, biases and layer scales are there for who has them.
    """
    sources: dict[str, Source] = {
        "embeddings.cls_token": ("cls_token", 0, 1),
        "embeddings.position_embeddings": ("pos_embed", 0, 1),
        "embeddings.mask_token": ("mask_token", 0, 1),
        "embeddings.register_tokens": ("register_tokens", 0, 1),
        **_pair("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        **_pair("layernorm", "norm"),
    }
    for number in range(depth):
        theirs = f"blocks.{number}"
        if is_vit:
            sources |= _vit_block(f"layers.{number}", theirs)
            continue
        ours = f"encoder.layer.{number}"
        sources |= _pair(f"{ours}.norm1", f"{theirs}.norm1") | _pair(f"{ours}.norm2", f"{theirs}.norm2")
        sources |= _attention(ours, theirs)
        for index in (1, 2):
            sources[f"{ours}.layer_scale{index}.lambda1"] = (f"{theirs}.ls{index}.gamma", 0, 1)
        if is_gated:
            sources |= _pair(f"{ours}.mlp.gate_proj", f"{theirs}.mlp.w12", 0, 2)
            sources |= _pair(f"{ours}.mlp.up_proj", f"{theirs}.mlp.w12", 1, 2)
            sources |= _pair(f"{ours}.mlp.down_proj", f"{theirs}.mlp.w3")
        else:
            sources |= _feed_forward(ours, theirs)
    return sources


def decoder_sources(depth: int) -> dict[str, Source]:
    """The names of the decoder in a ViTMAEForPreTraining, and what they come from."""
    sources: dict[str, Source] = {
        "decoder.mask_token": ("mask_token", 0, 1),
        "decoder.decoder_pos_embed": ("decoder_pos_embed", 0, 1),
    }
    for name in ("decoder_embed", "decoder_norm", "decoder_pred"):
        sources |= _pair(f"decoder.{name}", name)
    for number in range(depth):
        sources |= _vit_block(f"decoder.decoder_layers.{number}", f"decoder_blocks.{number}")
    return sources


def _vit_block(ours: str, theirs: str) -> dict[str, Source]:
    norms = _pair(f"{ours}.layernorm_before", f"{theirs}.norm1") | _pair(f"{ours}.layernorm_after", f"{theirs}.norm2")
    return norms | _attention(ours, theirs) | _feed_forward(ours, theirs)


def _attention(ours: str, theirs: str) -> dict[str, Source]:
    sources = _pair(f"{ours}.attention.o_proj", f"{theirs}.attn.proj")
    for part, letter in enumerate("qkv"):
        sources |= _pair(f"{ours}.attention.{letter}_proj", f"{theirs}.attn.qkv", part, 3)
    return sources


def _feed_forward(ours: str, theirs: str) -> dict[str, Source]:
    return _pair(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1") | _pair(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2")


def _pair(ours: str, theirs: str, part: int = 0, parts: int = 1) -> dict[str, Source]:
    return {f"{ours}.{kind}": (f"{theirs}.{kind}", part, parts) for kind in ("weight", "bias")}
