"""Configuration of random views of an image: window, mirror, colours. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from unclipped.core.config import FrozenConfig, Number, Pixels, Share, Whole

Sigma = Annotated[Number, Field(gt=0, le=1000)]
Aspect = Annotated[Number, Field(gt=0, le=1000)]
Area = Annotated[Share, Field(gt=0)]
PUBLISHED_SIDE = 224
"""Side in pixels of the global views that published widths of a blur are meant for."""


class ColourConfig(FrozenConfig):
    """Random changes of colour, each drawn on its own, in this order: jitter, grey, blur, solarisation."""

    jitter: Share = 0.8
    """Probability that brightness, contrast, saturation and hue change, in a random order."""
    brightness: Share = 0.4
    """Largest relative change of all values: 0.4 draws a factor from 0.6 to 1.4."""
    contrast: Share = 0.4
    """Largest relative change of the distance from the mean grey."""
    saturation: Share = 0.2
    """Largest relative change of the distance from a pixel's own grey."""
    hue: Annotated[Number, Field(ge=0, le=0.5)] = 0.1
    """Largest turn of the hue, as a share of the colour circle."""
    grey: Share = 0.2
    """Probability that the view loses its colour."""
    blur: Share = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[Sigma, Sigma] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels of the view."""
    solarise: Share = 0.0
    """Probability that values from `solarise_from` on are inverted."""
    solarise_from: Annotated[Whole, Field(ge=0, le=255)] = 128
    """Smallest value that solarisation inverts."""

    @model_validator(mode="after")
    def _ordered(self) -> ColourConfig:
        _check_order("blur_sigma", self.blur_sigma)
        return self


class ViewConfig(FrozenConfig):
    """How one random view is cut from an image."""

    size: Pixels
    """Side of the square view in pixels."""
    scale: tuple[Area, Area] = (0.2, 1.0)
    """Smallest and largest share of the image's area in the window."""
    aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Smallest and largest width of the window divided by its height; drawn evenly in the logarithm."""
    mirror: Share = 0.5
    """Probability that left and right change places."""
    colours: ColourConfig | None = None
    """Changes of colour; null: none."""
    strict: bool = False
    """Refuse images with a side shorter than the view. By default they are enlarged: a window is often smaller than
    the view that is made of it, so a small image is nothing special."""

    @model_validator(mode="after")
    def _ordered(self) -> ViewConfig:
        _check_order("scale", self.scale)
        _check_order("aspect", self.aspect)
        return self


def dinov2_colours(global_size: int = PUBLISHED_SIDE) -> tuple[ColourConfig, ColourConfig, ColourConfig]:
    """Colours of the first global view, the second, and the local ones, as in DINOv2 (arXiv 2304.07193).

    The published blur of 0.1 to 2 px is meant for global views of 224 px; for another `global_size` in pixels it is
    the same share of the side.
    """
    sigma = (0.1 * global_size / PUBLISHED_SIDE, 2.0 * global_size / PUBLISHED_SIDE)
    return (
        ColourConfig(blur=1.0, blur_sigma=sigma),
        ColourConfig(blur=0.1, blur_sigma=sigma, solarise=0.2),
        ColourConfig(blur=0.5, blur_sigma=sigma),
    )


def _check_order(name: str, bounds: tuple[float, float]) -> None:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name}: expected the smaller bound first, found {list(bounds)}; swap them")
