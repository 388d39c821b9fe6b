"""Standard connector parts: average merge, pixel shuffle, bilinear resampling; linear and mlp projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from unclipped.connectors.parts.base import PROJECTIONS, STEPS, Projection, Step
from unclipped.core.config import Whole
from unclipped.images.config import Grid

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_LAYERS = 64


@STEPS.register("average")
class Average(Step):
    """Mean of each block."""

    def apply(self, features: Tensor) -> Tensor:
        """(b, r, c, w) -> (b, r/size_r, c/size_c, w), the mean in fp32."""
        return self.blocks(features).float().mean(dim=(2, 4)).to(features.dtype)


@STEPS.register("pixel_shuffle")
class PixelShuffle(Step):
    """The features of each block next to each other, row-major; nothing is lost."""

    def out_width(self, width: int) -> int:
        return width * self.size[0] * self.size[1]

    def apply(self, features: Tensor) -> Tensor:
        """(b, r, c, w) -> (b, r/size_r, c/size_c, size_r*size_c*w)."""
        blocks = self.blocks(features).permute(0, 1, 3, 2, 4, 5)  # (b, r', c', size_r, size_c, w)
        return blocks.flatten(3)

    def inverse(self, features: Tensor) -> Tensor:
        """Exact inverse of `apply`: (b, r', c', size_r*size_c*w) -> (b, r'*size_r, c'*size_c, w)."""
        (r, c), (batch, rows, columns, width) = self.size, features.shape
        blocks = features.reshape(batch, rows, columns, r, c, width // (r * c)).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(batch, rows * r, columns * c, -1)


@STEPS.register("resample")
class Resample(Step):
    """Bilinear resampling to a grid of `size`, in fp32.

    Positions are cell centres (`align_corners=False`), and shrinking is antialiased, so that every input position
    counts: encoders of different grids then give tokens of the same places.
    """

    def out_grid(self, grid: Grid) -> Grid:
        return grid[0], *self.size

    @property
    def merge(self) -> tuple[int, int] | None:
        return None

    def apply(self, features: Tensor) -> Tensor:
        """(b, r, c, w) -> (b, size_r, size_c, w)."""
        from torch.nn import functional as F

        if tuple(features.shape[1:3]) == self.size:
            return features
        planes = features.permute(0, 3, 1, 2).float()  # (b, w, r, c)
        planes = F.interpolate(planes, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        return planes.permute(0, 2, 3, 1).to(features.dtype)


@PROJECTIONS.register("linear")
class Linear(Projection):
    """One layer with bias."""

    def build(self, in_features: int, out_features: int) -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(in_features, out_features))


@PROJECTIONS.register("mlp")
class MLP(Projection):
    """`layers` layers with bias and exact GELU between them; the inner width is that of the language model."""

    layers: Annotated[Whole, Field(ge=1, le=MAX_LAYERS)] = 2

    def build(self, in_features: int, out_features: int) -> nn.Module:
        from torch import nn

        modules: list[nn.Module] = [nn.Linear(in_features, out_features)]
        for _ in range(self.layers - 1):
            modules += [nn.GELU(), nn.Linear(out_features, out_features)]
        return nn.Sequential(*modules)
