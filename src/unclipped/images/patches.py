"""Planes to patches and back: one reshape each way, exact.

Patches lie in row-major order over the grid; inside a patch the values run channel, row, column.
"""

from __future__ import annotations

from torch import Tensor

from unclipped.core.errors import ImageError


def patchify(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut planes into flattened patches.

    pixels: (C, H, W) or (B, C, H, W), any dtype; patch_size: (ph, pw) px.
    Returns (h*w, C*ph*pw) or (B, h*w, C*ph*pw) with h = H/ph and w = W/pw.
    Raises ImageError when H or W is no multiple of the patch.
    """
    if pixels.ndim not in (3, 4):
        raise ImageError(f"patchify: expected planes (C, H, W) or (B, C, H, W), found shape {tuple(pixels.shape)}")
    *batch, channels, height, width = pixels.shape
    ph, pw = patch_size
    if height % ph or width % pw:
        raise ImageError(
            f"patchify: {height}x{width} px cannot be cut into {ph}x{pw} px patches; resize to multiples of the patch"
        )
    h, w = height // ph, width // pw
    parts = pixels.reshape(*batch, channels, h, ph, w, pw)
    parts = parts.movedim((-4, -2), (-5, -4))  # (…, h, w, C, ph, pw)
    return parts.reshape(*batch, h * w, channels * ph * pw)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: tuple[int, int], channels: int = 3) -> Tensor:
    """Put patches together into planes; the exact inverse of `patchify`.

    patches: (h*w, C*ph*pw) or (B, h*w, C*ph*pw); grid: (h, w) patches; patch_size: (ph, pw) px.
    Returns (C, H, W) or (B, C, H, W). Raises ImageError when the shapes do not fit.
    """
    h, w = grid
    ph, pw = patch_size
    expected = (h * w, channels * ph * pw)
    if patches.ndim not in (2, 3) or tuple(patches.shape[-2:]) != expected:
        raise ImageError(
            f"unpatchify: expected (…, {expected[0]}, {expected[1]}) for a {h}x{w} grid of {channels}-channel "
            f"{ph}x{pw} px patches, found {tuple(patches.shape)}"
        )
    batch = patches.shape[:-2]
    parts = patches.reshape(*batch, h, w, channels, ph, pw)
    parts = parts.movedim((-5, -4), (-4, -2))  # (…, C, h, ph, w, pw)
    return parts.reshape(*batch, channels, h * ph, w * pw)
