"""From packed patches to the decoder's width: the only new weights of an encoder made from a language model."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from unclipped.core.errors import UsageError
from unclipped.images.patches import unpatchify

# Standard deviation of a unit normal cut at ±2: dividing by it restores the intended spread.
TRUNCATED_STD = 0.87962566103423978
CONVOLUTION_STRIDE = 4


def truncated_lecun_normal_(weight: Tensor) -> Tensor:
    """Normal cut at two deviations, with standard deviation 1/√fan_in after the cut."""
    fan_in = weight[0].numel()
    std = 1 / math.sqrt(fan_in) / TRUNCATED_STD
    return init.trunc_normal_(weight, mean=0.0, std=std, a=-2 * std, b=2 * std)


class LinearStem(nn.Module):
    """One linear map of the patch values (channel, row, column): equal to a convolution with stride = kernel."""

    def __init__(self, channels: int, patch_size: tuple[int, int], hidden_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels * patch_size[0] * patch_size[1], hidden_size)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, channels·ph·pw) → (B, n, hidden); the grid is not needed."""
        return self.projection(patches)


class ConvolutionStem(nn.Module):
    """Two 3×3 convolutions of stride 2, then the patch cut on the plane that is a quarter as high and wide.

    Good for text lines: strokes are seen before they are cut into columns. Patches of one image see across their
    borders here; images never see each other.
    """

    def __init__(self, channels: int, patch_size: tuple[int, int], hidden_size: int, stem_channels: int) -> None:
        super().__init__()
        height, width = patch_size
        if height % CONVOLUTION_STRIDE or width % CONVOLUTION_STRIDE:
            raise UsageError(
                f"stem 'convolution': expected a patch size divisible by {CONVOLUTION_STRIDE} in both directions, "
                f"found {height}×{width}; change patch_size or use stem 'linear'"
            )
        self.channels, self.patch_size = channels, patch_size
        self.cut = (height // CONVOLUTION_STRIDE, width // CONVOLUTION_STRIDE)
        self.first = nn.Conv2d(channels, stem_channels // 2, kernel_size=3, stride=2, padding=1)
        self.second = nn.Conv2d(stem_channels // 2, stem_channels, kernel_size=3, stride=2, padding=1)
        self.projection = nn.Conv2d(stem_channels, hidden_size, kernel_size=self.cut, stride=self.cut)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, channels·ph·pw) of one common grid → (B, n, hidden)."""
        planes = to_planes(patches, grid, self.patch_size, self.channels)  # (B, C, H, W)
        planes = functional.gelu(self.first(planes))  # (B, stem/2, H/2, W/2)
        planes = functional.gelu(self.second(planes))  # (B, stem, H/4, W/4)
        return self.projection(planes).flatten(2).transpose(1, 2)  # (B, n, hidden)


def to_planes(patches: Tensor, grid: tuple[int, int], patch_size: tuple[int, int], channels: int) -> Tensor:
    """(B, h·w, channels·ph·pw) → (B, channels, h·ph, w·pw)."""
    return unpatchify(patches, grid, patch_size, channels)


def initialise_stem(module: nn.Module) -> None:
    """Truncated LeCun normal weights and zero biases for the stem's linear and convolution layers."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        truncated_lecun_normal_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)


def build_stem(
    kind: str, channels: int, patch_size: tuple[int, int], hidden_size: int, stem_channels: int
) -> LinearStem | ConvolutionStem:
    """The stem named `kind`: "linear" or "convolution"."""
    if kind == "linear":
        return LinearStem(channels, patch_size, hidden_size)
    if kind == "convolution":
        return ConvolutionStem(channels, patch_size, hidden_size, stem_channels)
    raise UsageError(f"unknown stem '{kind}'; valid: convolution, linear")
