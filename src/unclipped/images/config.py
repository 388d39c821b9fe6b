"""What is done to an image before the encoder, as one immutable value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unclipped.core.config import FrozenConfig, Number, PatchSide, Pixels, Tokens, Whole

Grid = tuple[int, int, int]
"""(frames, rows, columns) of an image: in patches before the connector, in tokens behind it."""

MAX_PIXELS = 67_108_864  # 8192 x 8192 px: 192 MiB once decoded to RGB
MAX_SIDE = 20_000  # px

_PAIRS, _OF_CHANNELS = ("size", "patch_size", "merge"), ("mean", "std")
BROADCAST = (*_PAIRS, *_OF_CHANNELS)
"""Fields of the rule for which one number means the same on both axes, or for every channel."""
Level = Annotated[Whole, Field(ge=0, le=255)]
"""A value of one of eight-bit RGB."""
Merge = Annotated[Whole, Field(ge=1, le=1024)]
"""Patches that become one token along one side."""
ChannelValues = Annotated[tuple[Annotated[Number, Field(ge=-1000, le=1000)], ...], Field(min_length=1, max_length=3)]
PixelLimit = Annotated[Whole, Field(ge=1, le=10**12)]
SideLimit = Annotated[Whole, Field(ge=1, le=10**6)]


class ImageRule(FrozenConfig):
    """How an image becomes a grid of normalised patches.

    A *block* is what one token covers after the connector's merge: (patch height * merge rows, patch width * merge
    columns) pixels. All sizes are (height, width).
    """

    rule: Literal["native", "squash", "pad", "crop"] = "native"
    """native: own size and aspect under a token budget; squash, pad, crop: the fixed `size`."""
    size: tuple[Pixels, Pixels] | None = None
    """(height, width) in px of every image for squash, pad and crop; None for native. One number means a square."""
    patch_size: tuple[PatchSide, PatchSide] = (16, 16)
    """(height, width) of a patch in px. One number means a square."""
    merge: tuple[Merge, Merge] = (1, 1)
    """Patches that the connector merges into one token, (rows, columns). One number means a square."""
    min_tokens: Tokens = 1
    """native: smallest number of tokens after the merge, honoured when the budget and the aspect permit."""
    max_tokens: Tokens = 1024
    """native: budget in tokens after the merge, never exceeded."""
    fixed_height: Pixels | None = None
    """native: height in px of every image, the width following the aspect up to the budget (text lines)."""
    native_variant: Literal["area", "qwen2_vl", "siglip2"] = "area"
    """native: the arithmetic of the target size; `qwen2_vl` and `siglip2` are those of the encoders of these names."""
    shorter_side: Pixels | None = None
    """crop: px that the shorter side is scaled to before the centre is cut; None: just enough to cover `size`."""
    mean: ChannelValues = (0.5,)
    """Mean of each channel on values in 0..1. One number means every channel."""
    std: ChannelValues = (0.5,)
    """Standard deviation of each channel on values in 0..1. One number means every channel."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for luminance."""
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of the resize (both are antialiased when an image shrinks)."""
    background: tuple[Level, Level, Level] = (255, 255, 255)
    """RGB in 0..255 that shows through transparency and fills the border of pad."""
    max_pixels: PixelLimit = MAX_PIXELS
    """Images of more pixels are refused from their header, before they are decoded."""
    max_side: SideLimit = MAX_SIDE
    """Images with a longer side, in px, are refused from their header, before they are decoded."""

    @model_validator(mode="before")
    @classmethod
    def _broadcast(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name in _PAIRS:
            if isinstance(data.get(name), int):
                data[name] = (data[name], data[name])
        channels = data.get("channels", 3)
        if channels in (1, 3):
            for name in _OF_CHANNELS:
                value = data.get(name, 0.5)
                if isinstance(value, (int, float)):
                    data[name] = (value,) * channels
                elif isinstance(value, (list, tuple)) and value and all(part == value[0] for part in value):
                    data[name] = tuple(value[:1]) * channels
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ImageRule:
        if self.rule == "native":
            self._check_native()
        else:
            self._check_fixed()
        if self.shorter_side is not None:
            if self.rule != "crop":
                raise ValueError(f"shorter_side belongs to rule crop; found rule {self.rule}")
            if self.size is not None and self.shorter_side < max(self.size):
                raise ValueError(f"shorter_side {self.shorter_side} is smaller than size {self.size}: raise it")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} needs {self.channels} numbers, one a channel; found {getattr(self, name)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive; found {self.std}")
        return self

    def _check_native(self) -> None:
        if self.size is not None:
            raise ValueError("rule native has no size: leave it out, or choose squash, pad or crop")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if self.native_variant == "qwen2_vl" and self.block[0] != self.block[1]:
            raise ValueError(f"native_variant qwen2_vl needs square blocks; patch_size * merge is {self.block} px")
        if self.native_variant == "siglip2" and self.min_tokens > 1:
            raise ValueError("native_variant siglip2 has no min_tokens: it always fills the budget; leave it out")
        if self.fixed_height is not None:
            if self.native_variant != "area":
                raise ValueError("fixed_height goes with native_variant area only")
            if self.fixed_height < 1 or self.fixed_height % self.block[0]:
                raise ValueError(
                    f"fixed_height {self.fixed_height} is no multiple of the block height {self.block[0]} "
                    "(patch height * merge rows)"
                )
            if self.fixed_height // self.block[0] > self.max_tokens:
                raise ValueError(
                    f"fixed_height {self.fixed_height} has more rows of tokens than max_tokens {self.max_tokens}"
                )

    def _check_fixed(self) -> None:
        if self.size is None:
            raise ValueError(f"rule {self.rule} needs a size (height, width) in px")
        if self.size[0] % self.block[0] or self.size[1] % self.block[1]:
            raise ValueError(
                f"size {self.size} is no multiple of patch_size * merge = {self.block} px: choose "
                f"{tuple(max(1, round(side / unit)) * unit for side, unit in zip(self.size, self.block, strict=True))}"
            )
        if self.fixed_height is not None or self.native_variant != "area":
            raise ValueError(f"fixed_height and native_variant belong to rule native; found rule {self.rule}")

    @property
    def block(self) -> tuple[int, int]:
        """(height, width) in px that one token covers after the merge."""
        return self.patch_size[0] * self.merge[0], self.patch_size[1] * self.merge[1]

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: channels * patch height * patch width."""
        return self.channels * self.patch_size[0] * self.patch_size[1]
