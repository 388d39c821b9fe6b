"""Masks of a generated scene's objects, from its ground truth: which object shows at each pixel.

A pixel belongs to the last painted object that covers at least half of it, as smooth edges cover pixels in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unclipped.data.generated.scene import Scene
from unclipped.data.sample import Sample


def visible_objects(scene: Scene) -> NDArray[np.uint8]:
    """(height, width): the number of the object that shows at each pixel, from 1 in painting order; 0: background.

    Raises ValueError for more than 255 objects.
    """
    if len(scene.items) > 255:
        raise ValueError(f"a mask numbers at most 255 objects, found {len(scene.items)}")
    numbers = Image.new("L", (scene.width, scene.height))
    for number, item in enumerate(scene.items, start=1):
        x0, y0, x1, y1 = item.box
        if item.stamps is None:
            numbers.paste(number, (x0, y0, x1, y1))
            continue
        for mask, x, y in item.stamps:
            numbers.paste(number, (x0 + x, y0 + y), mask.convert("1", dither=Image.Dither.NONE))  # 128 and more of 255
    return np.array(numbers)


def class_mask(scene: Scene, kinds: Sequence[str]) -> NDArray[np.uint8]:
    """(height, width): 0 background, else 1 + the place in `kinds` of what shows there. At most 254 kinds."""
    classes = np.array([0, *(1 + kinds.index(item.kind) for item in scene.items)], dtype=np.uint8)
    return classes[visible_objects(scene)]


def packed(numbers: NDArray[np.uint8]) -> dict[str, Any]:
    """`visible_objects` for JSON: `size` [height, width], `runs` [number, pixels, number, pixels, …] row by row."""
    flat = numbers.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    lengths = np.diff(starts, append=len(flat))
    return {"size": list(numbers.shape), "runs": np.stack([flat[starts], lengths], axis=1).ravel().tolist()}


def unpacked(masks: Mapping[str, Any]) -> NDArray[np.uint8]:
    """(height, width) out of `packed`."""
    runs = np.array(masks["runs"], dtype=np.int64).reshape(-1, 2)
    return np.repeat(runs[:, 0], runs[:, 1]).reshape(masks["size"]).astype(np.uint8)


def object_masks(sample: Sample) -> NDArray[np.bool_]:
    """(objects, height, width): the visible pixels of each object of `metadata["scene"]["objects"]`, in their order.

    `sample`: one of `generated:captions`, whose metadata carries `masks`.
    """
    count = len(sample.metadata["scene"]["objects"])
    return unpacked(sample.metadata["masks"])[None] == np.arange(1, count + 1)[:, None, None]
