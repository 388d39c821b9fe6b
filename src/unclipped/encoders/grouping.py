"""Packed patches in, packed features out, with whole batches in between and no padding anywhere."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from unclipped.core.errors import DataError

Grid = tuple[int, int]
"""Rows and columns of patches of one frame."""


ImageGrids = Tensor | Sequence[Sequence[int]]
"""(t, h, w) of every image: a tensor (images, 3), or Python integers. A graph that is compiled or exported holds the
integers as constants; a tensor's values are unknown while it is traced."""


def grid_rows(image_grid_thw: ImageGrids) -> list[tuple[int, int, int]]:
    """(t, h, w) of every image as Python integers. Raises DataError for another shape than (images, 3)."""
    if isinstance(image_grid_thw, Tensor):
        if image_grid_thw.ndim != 2 or image_grid_thw.shape[-1] != 3:
            raise DataError(f"image_grid_thw: expected shape (images, 3), found {tuple(image_grid_thw.shape)}")
        image_grid_thw = image_grid_thw.tolist()
    rows: list[tuple[int, int, int]] = []
    for index, row in enumerate(image_grid_thw):
        if len(row) != 3:
            raise DataError(f"image_grid_thw[{index}]: expected three integers t, h, w, found {len(row)}")
        rows.append((int(row[0]), int(row[1]), int(row[2])))
    return rows


def frames_of(image_grid_thw: ImageGrids, num_patches: int) -> list[Grid]:
    """Grid (h, w) of every frame, in order: an entry (t, h, w) gives t frames, each encoded by itself.

    Raises DataError when an entry is not positive or when the grids do not add up to `num_patches`.
    """
    frames: list[Grid] = []
    for index, (t, h, w) in enumerate(grid_rows(image_grid_thw)):
        if min(t, h, w) < 1:
            raise DataError(f"image_grid_thw[{index}]: expected positive t, h, w, found ({t}, {h}, {w})")
        frames.extend([(h, w)] * t)
    total = sum(h * w for h, w in frames)
    if total != num_patches:
        raise DataError(
            f"image_grid_thw asks for {total} patches, pixel_values holds {num_patches}; "
            "prepare both with the same image processor"
        )
    return frames


def encode_in_groups(
    pixel_values: Tensor,
    frames: Sequence[Grid],
    key: Callable[[Grid], Hashable],
    encode: Callable[[Tensor, list[Grid]], Tensor],
) -> Tensor:
    """Batch the frames whose `key` is equal, encode each batch, and put the features back in input order.

    pixel_values (sum_patches, values) → (sum_patches, hidden). `encode` maps (B, n, values) and B grids to
    (B, n, hidden); all frames of one key must have the same n.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, frame in enumerate(frames):
        groups.setdefault(key(frame), []).append(index)
    lengths = [h * w for h, w in frames]
    if len(groups) == 1:  # the usual case of fixed-size images: one view, no copies
        batch = pixel_values.reshape(len(frames), lengths[0], -1)  # (B, n, values)
        return encode(batch, list(frames)).flatten(0, 1)  # (B·n, hidden)
    pieces = pixel_values.split(lengths)
    features: list[Tensor] = [pixel_values] * len(frames)
    for members in groups.values():
        batch = torch.stack([pieces[index] for index in members])  # (B, n, values)
        encoded = encode(batch, [frames[index] for index in members])  # (B, n, hidden)
        for index, image in zip(members, encoded.unbind(0), strict=True):
            features[index] = image
    return torch.cat(features)  # (sum_patches, hidden)
