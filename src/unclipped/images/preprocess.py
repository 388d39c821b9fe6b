"""A decoded image to normalised, flattened patches, with as few passes over the pixels as possible.

The definition is: resize by the rule, x/255, (x - mean)/std a channel, cut into patches. Done in that order every pass
but the first runs over float planes. Here the patches are cut from bytes, and both affine steps are one: x*scale +
offset. The results agree within 1e-5 (the tests hold it); the pixels of the resize are Pillow's own, exactly.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclipped.core.errors import ImageError
from unclipped.images.config import ImageRule
from unclipped.images.rules import apply_rule


def preprocess_image(image: Image.Image, rule: ImageRule) -> tuple[Tensor, tuple[int, int, int]]:
    """Resize, cut and normalise one image.

    image: mode RGB or L, as `load_image` gives it; a grey image costs a third of a coloured one until the last step.
    Returns (patches float32 (h*w, C*ph*pw), grid (1, h, w)). Raises ImageError for another mode.
    """
    if image.mode not in ("RGB", "L"):
        raise ImageError(f"image of mode {image.mode}: expected RGB or L; decode it with load_image")
    if rule.channels == 1 and image.mode != "L":
        image = image.convert("L")
    image = apply_rule(image, rule)
    ph, pw = rule.patch_size
    w, h = image.width // pw, image.height // ph
    patches = torch.from_numpy(_cut(image, h, w, ph, pw)).float()  # (h*w, bands*ph*pw)
    if image.mode == "L" and rule.channels == 3:
        patches = patches.repeat(1, 3)  # equal channels: (h*w, C*ph*pw)
    scale, offset = _affine(rule.mean, rule.std, ph * pw)  # each (1, C*ph*pw)
    return torch.addcmul(offset, patches, scale, out=patches), (1, h, w)


def _cut(image: Image.Image, h: int, w: int, ph: int, pw: int) -> np.ndarray:
    """Bytes of an image as patches, uint8 (h*w, bands*ph*pw), values in the order channel, row, column: one copy."""
    bands = len(image.mode)  # RGB or L
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(h, ph, w, pw, bands)
    return np.array(pixels.transpose(0, 2, 4, 1, 3), order="C").reshape(h * w, bands * ph * pw)


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], pixels: int) -> tuple[Tensor, Tensor]:
    """Rows (1, C*pixels) of scale and offset with x*scale + offset = (x/255 - mean)/std, rounded once from float64."""
    centre, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    scale, offset = 1 / (255 * spread), -centre / spread
    return scale.float().repeat_interleave(pixels)[None], offset.float().repeat_interleave(pixels)[None]
