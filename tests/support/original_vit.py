"""Vision transformers as the code of DINOv2 and MAE names and computes them, in NumPy float64, from their description.

Written without the package: tensors are drawn under original names, and features, head scores and reconstructions are
computed from those names alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any
_erf = np.vectorize(math.erf)


@dataclass(frozen=True)
class OriginalVit:
    """Sizes of an encoder. `rows` of patches a side; `chunks` > 0 nests blocks as training on many machines does."""

    width: int = 24
    depth: int = 2
    heads: int = 3
    patch: int = 4
    rows: int = 3
    channels: int = 3
    ratio: int = 4
    is_gated: bool = False
    registers: int = 0
    has_layer_scale: bool = True
    has_qkv_bias: bool = True
    has_mask_token: bool = True
    chunks: int = 0

    @property
    def hidden(self) -> int:
        inner = self.ratio * self.width
        return math.ceil(int(inner * 2 / 3) / 8) * 8 if self.is_gated else inner

    @property
    def side(self) -> int:
        return self.rows * self.patch

    def tensors(self, seed: int | None = 0) -> dict[str, Tensor]:
        """Random weights under original names; without a seed their shapes alone, on the meta device."""
        draw = Draw(seed)
        w, named = self.width, {}
        named["cls_token"] = draw(1, 1, w)
        named["pos_embed"] = draw(1, self.rows**2 + 1, w)
        if self.has_mask_token:
            named["mask_token"] = draw(1, w)
        if self.registers:
            named["register_tokens"] = draw(1, self.registers, w)
        named["patch_embed.proj.weight"] = draw(w, self.channels, self.patch, self.patch)
        named["patch_embed.proj.bias"] = draw(w)
        for number in range(self.depth):
            name = f"blocks.{number}"
            if self.chunks:
                name = f"blocks.{number // math.ceil(self.depth / self.chunks)}.{number}"
            named |= draw.block(name, w, self.hidden, is_gated=self.is_gated, has_scale=self.has_layer_scale)
            if not self.has_qkv_bias:
                del named[f"{name}.attn.qkv.bias"]
        return named | draw.norm("norm", w)


class Draw:
    """Random tensors; those of norms and scales lie around one, so that leaving one out shows."""

    def __init__(self, seed: int | None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, around: float = 0.0) -> Tensor:
        if self.generator is None:
            return torch.empty(*shape, device="meta")
        return around + 0.3 * torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(outputs, inputs), f"{name}.bias": self(outputs)}

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(width, around=1.0), f"{name}.bias": self(width)}

    def block(self, name: str, width: int, hidden: int, *, is_gated: bool, has_scale: bool) -> dict[str, Tensor]:
        named = self.norm(f"{name}.norm1", width) | self.norm(f"{name}.norm2", width)
        named |= self.linear(f"{name}.attn.qkv", width, 3 * width) | self.linear(f"{name}.attn.proj", width, width)
        if is_gated:
            named |= self.linear(f"{name}.mlp.w12", width, 2 * hidden) | self.linear(f"{name}.mlp.w3", hidden, width)
        else:
            named |= self.linear(f"{name}.mlp.fc1", width, hidden) | self.linear(f"{name}.mlp.fc2", hidden, width)
        if has_scale:
            named |= {f"{name}.ls{index}.gamma": self(width, around=0.5) for index in (1, 2)}
        return named

    def head(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> dict[str, Tensor]:
        """A DINO head whose last layer's rows are of any length, and its gains of any size."""
        named = self.linear("mlp.0", width, hidden) | self.linear("mlp.2", hidden, hidden)
        named |= self.linear("mlp.4", hidden, bottleneck)
        gains, directions = self(prototypes, 1, around=1.0), self(prototypes, bottleneck)
        return named | {"last_layer.weight_g": gains, "last_layer.weight_v": directions}

    def decoder(self, sizes: OriginalVit, width: int, depth: int, hidden: int) -> dict[str, Tensor]:
        """The decoder of a masked autoencoder on that encoder, with its fixed positions."""
        named = self.linear("decoder_embed", sizes.width, width) | self.norm("decoder_norm", width)
        named |= self.linear("decoder_pred", width, sizes.channels * sizes.patch**2)
        named["mask_token"] = self(1, 1, width)
        table = np.concatenate((np.zeros((1, width)), sines(sizes.rows, width)))
        named["decoder_pos_embed"] = torch.from_numpy(table[None]).float()
        for number in range(depth):
            named |= self.block(f"decoder_blocks.{number}", width, hidden, is_gated=False, has_scale=False)
        return named


def sines(rows: int, width: int) -> Array:
    """(rows², width): sines and cosines of the column, then of the row."""
    frequency = 1 / 10000 ** (np.arange(width // 4) / (width // 4))
    table = []
    for place in range(rows * rows):
        angles = [(place % rows) * frequency, (place // rows) * frequency]
        table.append(np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))]))
    return np.stack(table)


class Computed:
    """Forward passes over tensors of original names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.named = {name: value.double().numpy() for name, value in tensors.items()}

    def features(self, planes: Array, heads: int, mask: Array | None = None) -> Array:
        """(B, 1 + registers + n, D), after the final norm. mask (B, n): patches replaced by the mask token."""
        tokens = self.patches(planes)
        if mask is not None:
            tokens = np.where(mask[..., None], self.named["mask_token"].reshape(-1), tokens)
        tokens = tokens + self.named["pos_embed"][:, 1:]
        prefix = [self.named["cls_token"] + self.named["pos_embed"][:, :1]]
        if "register_tokens" in self.named:  # they have no position
            prefix.append(self.named["register_tokens"])
        batch = len(planes)
        tokens = np.concatenate([*(np.repeat(part, batch, axis=0) for part in prefix), tokens], axis=1)
        return self.norm(self.blocks(tokens, "blocks", heads), "norm")

    def reconstruction(self, planes: Array, keep: Array, heads: int, decoder_heads: int) -> Array:
        """(B, n, patch²·C): what a masked autoencoder makes of the patches at keep (B, k), in image order."""
        embedded = self.patches(planes) + self.named["pos_embed"][:, 1:]
        images = []
        for image, places in zip(embedded, keep, strict=True):
            start = self.named["cls_token"][0] + self.named["pos_embed"][0, :1]
            seen = np.concatenate((start, image[places]))[None]
            seen = self.norm(self.blocks(seen, "blocks", heads), "norm")
            seen = self.linear(seen, "decoder_embed")[0]
            whole = np.repeat(self.named["mask_token"][0], len(image), axis=0)
            whole[places] = seen[1:]
            tokens = np.concatenate((seen[:1], whole))[None] + self.named["decoder_pos_embed"]
            tokens = self.norm(self.blocks(tokens, "decoder_blocks", decoder_heads), "decoder_norm")
            images.append(self.linear(tokens, "decoder_pred")[0, 1:])
        return np.stack(images)

    def scores(self, features: Array, head: str = "") -> Array:
        """A DINO head's: each row of the last layer is its direction at length one, times its gain."""
        for layer in (0, 2, 4):
            features = self.linear(features, f"{head}mlp.{layer}")
            features = gelu(features) if layer < 4 else features
        features = features / np.linalg.norm(features, axis=-1, keepdims=True)
        gains, directions = (self.named[f"{head}last_layer.weight_{letter}"] for letter in "gv")
        rows = directions / np.linalg.norm(directions, axis=1, keepdims=True) * gains
        return features @ rows.T

    def patches(self, planes: Array) -> Array:
        """(B, n, D): each patch times each kernel."""
        kernel = self.named["patch_embed.proj.weight"]
        size = kernel.shape[2]
        batch, _, height, width = planes.shape
        rows = []
        for top in range(0, height, size):
            for left in range(0, width, size):
                window = planes[:, :, top : top + size, left : left + size].reshape(batch, -1)
                rows.append(window @ kernel.reshape(len(kernel), -1).T)
        return np.stack(rows, axis=1) + self.named["patch_embed.proj.bias"]

    def blocks(self, tokens: Array, kind: str, heads: int) -> Array:
        names = {
            name.rsplit(".norm1.", 1)[0] for name in self.named if name.startswith(f"{kind}.") and ".norm1." in name
        }
        for name in sorted(names, key=lambda name: int(name.rsplit(".", 1)[1])):
            tokens = tokens + self.scaled(
                self.attention(self.norm(tokens, f"{name}.norm1"), name, heads), f"{name}.ls1"
            )
            tokens = tokens + self.scaled(self.feed_forward(self.norm(tokens, f"{name}.norm2"), name), f"{name}.ls2")
        return tokens

    def attention(self, tokens: Array, name: str, heads: int) -> Array:
        batch, count, width = tokens.shape
        joined = self.linear(tokens, f"{name}.attn.qkv").reshape(batch, count, 3, heads, width // heads)
        query, key, value = (joined[:, :, part].transpose(0, 2, 1, 3) for part in range(3))  # (B, heads, t, d)
        logits = query @ key.transpose(0, 1, 3, 2) / math.sqrt(width // heads)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return self.linear((weights @ value).transpose(0, 2, 1, 3).reshape(batch, count, width), f"{name}.attn.proj")

    def feed_forward(self, tokens: Array, name: str) -> Array:
        if f"{name}.mlp.w12.weight" in self.named:
            gate, value = np.split(self.linear(tokens, f"{name}.mlp.w12"), 2, axis=-1)
            return self.linear(gate / (1 + np.exp(-gate)) * value, f"{name}.mlp.w3")
        return self.linear(gelu(self.linear(tokens, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    def scaled(self, tokens: Array, name: str) -> Array:
        return tokens * self.named.get(f"{name}.gamma", 1.0)

    def linear(self, tokens: Array, name: str) -> Array:
        return tokens @ self.named[f"{name}.weight"].T + self.named.get(f"{name}.bias", 0.0)

    def norm(self, tokens: Array, name: str) -> Array:
        centred = tokens - tokens.mean(axis=-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
        return centred / spread * self.named[f"{name}.weight"] + self.named[f"{name}.bias"]


def gelu(values: Array) -> Array:
    """Exact, by the error function."""
    return values * 0.5 * (1 + _erf(values / math.sqrt(2)))


def random_planes(sizes: OriginalVit, images: int = 2, seed: int = 9) -> Tensor:
    """(B, C, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, sizes.channels, sizes.side, sizes.side, generator=generator)
