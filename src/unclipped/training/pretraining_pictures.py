"""Pictures of an encoder's pretraining: what it sees, what it fills in, what its patches tell apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unclipped.core.errors import UnclippedError
from unclipped.images.config import ImageRule
from unclipped.images.patches import patchify, unpatchify
from unclipped.images.prepare import shown
from unclipped.objectives.base import Batch, Objective
from unclipped.objectives.health import patch_colours, undisturbed
from unclipped.objectives.masked_autoencoder import EPSILON, MaskedAutoencoder, MaskedAutoencoderObjective
from unclipped.objectives.trunk import Trunk
from unclipped.training.batches import StageBatches

PICTURES = "pictures"
_MARGIN = 4  # px
_IMAGES = 8


def draw_pictures(
    objective: Objective, batches: StageBatches, folder: Path, *, moment: Literal["start", "end"]
) -> list[Path]:
    """Write PNG files about the first micro-batch into `folder` and return their paths; none for other than images.

    `views.png` (at the start only): the images as the objective gets them, one row for all crops of an image.
    `reconstruction-MOMENT.png`: image, visible patches, what a masked autoencoder makes of them. `patches-MOMENT.png`:
    images and their patch features, principal components as colours. Leaves modes and random state as they were.
    Raises UnclippedError when a file cannot be written.
    """
    rule = getattr(batches.examples, "rule", None)  # examples of images alone or in pairs have one
    if not isinstance(rule, ImageRule):
        return []
    device = next(objective.parameters()).device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batches[0].items()}
    sheets: dict[str, Image.Image] = {}
    if moment == "start":
        sheets["views"] = contact_sheet(_views(batch, rule))
    trunk = _trunk_of(objective)
    with undisturbed(objective, device):
        if isinstance(objective, MaskedAutoencoderObjective):
            sheets[f"reconstruction-{moment}"] = contact_sheet(reconstruction(objective.model, batch, rule))
        elif trunk is not None:
            sheets[f"patches-{moment}"] = contact_sheet(_patch_pictures(trunk, batch, rule))
    return [_write(sheet, folder / f"{name}.png") for name, sheet in sheets.items()]


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Pictures (h, w, 1 or 3) uint8 in rows of equal length on white, columns as wide as their widest picture."""
    widths = [max(picture.shape[1] for picture in column) for column in zip(*rows, strict=True)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    size = sum(widths) + _MARGIN * (len(widths) + 1), sum(heights) + _MARGIN * (len(heights) + 1)
    sheet = Image.new("RGB", size, "white")
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for picture, width in zip(row, widths, strict=True):
            colours = np.broadcast_to(picture, (*picture.shape[:2], 3))
            sheet.paste(Image.fromarray(np.ascontiguousarray(colours)), (left, top))
            left += width + _MARGIN
        top += height + _MARGIN
    return sheet


def reconstruction(model: MaskedAutoencoder, batch: Batch, rule: ImageRule) -> list[list[np.ndarray]]:
    """Image, visible patches, and visible patches with what `model` puts in the others; a row for each image.

    `batch`: `pixel_values` (B, C, S, S) and `noise` (B, n). Where the model learns patches of mean 0 and variance 1,
    mean and variance of the true patch are put back, as in the loss: without them there is no picture.
    """
    pixels = batch["pixel_values"][:_IMAGES]
    output = model(pixels, batch["noise"][:_IMAGES])
    (height, width), channels = model.trunk.patch_size, pixels.shape[1]
    true = patchify(pixels, (height, width))  # (B, n, C·ph·pw)
    places = output.hidden[..., None].expand(-1, -1, true.shape[2])  # (B, h, C·ph·pw)
    predicted = output.predicted.to(true.dtype)
    if model.options.normalise_pixels:
        variance, mean = torch.var_mean(true.gather(1, places), dim=-1, keepdim=True)
        predicted = predicted * (variance + EPSILON).sqrt() + mean
    grey = torch.zeros_like(predicted)  # the mean colour, on the normalised scale
    columns = (true, true.scatter(1, places, grey), true.scatter(1, places, predicted))
    grid = pixels.shape[2] // height, pixels.shape[3] // width
    pictures = [shown(unpatchify(column, grid, (height, width), channels), rule) for column in columns]
    return [list(row) for row in zip(*pictures, strict=True)]


def _views(batch: Batch, rule: ImageRule) -> list[list[np.ndarray]]:
    """The batch's images: a row for each with all its crops, or several images in a row where each has one view."""
    if "global_crops" not in batch:
        pictures = list(shown(batch["pixel_values"], rule))
        columns = min(len(pictures), _IMAGES)
        pictures = pictures[: len(pictures) // columns * columns][: _IMAGES * columns]
        return [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    crops = [*shown(batch["global_crops"], rule), *shown(batch["local_crops"], rule)]
    images = len(batch["global_crops"]) // 2  # crops number i, i + images, i + 2·images… are those of image i
    return [crops[image::images] for image in range(min(images, _IMAGES))]


def _patch_pictures(trunk: Trunk, batch: Batch, rule: ImageRule) -> list[list[np.ndarray]]:
    """Image above its patch features as colours, one column for each image."""
    pixels = batch["global_crops" if "global_crops" in batch else "pixel_values"]
    pixels = pixels[: min(_IMAGES, len(pixels) // 2 if "global_crops" in batch else len(pixels))]
    height, width = trunk.patch_size
    grid = pixels.shape[2] // height, pixels.shape[3] // width
    colours = patch_colours(trunk(pixels).patches, grid)  # (B, h, w, 3)
    return [list(shown(pixels, rule)), list(colours.repeat(height, axis=1).repeat(width, axis=2))]


def _trunk_of(objective: Objective) -> Trunk | None:
    """The encoder that is trained, or its moving average where that is what is saved."""
    teacher = getattr(objective, "teacher", None)
    for owner in (teacher, objective.model):
        trunk = owner if isinstance(owner, Trunk) else getattr(owner, "trunk", None)
        if isinstance(owner, nn.Module) and isinstance(trunk, Trunk):
            return trunk
    return None


def _write(sheet: Image.Image, path: Path) -> Path:
    """Write under a temporary name, then rename. Raises UnclippedError when it cannot be written."""
    partial = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise UnclippedError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from None
    return path
