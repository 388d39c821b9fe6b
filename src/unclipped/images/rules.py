"""Resizing rules: which size an image gets, and the resize itself.

`target_size` and `grid_of` are pure functions of the size, so that tokens can be counted without decoding an image.

The native rule (variant "area"). Let y and x be the sides in blocks (real numbers), r the floor of the shorter side
after scaling to the budget. The image is scaled uniformly, up so that each side is at least one block and the area at
least `min_tokens`, down so that y*x <= max_tokens. Each side is then rounded down or up; of the four choices within
the budget the one with the least change of aspect is taken, the larger area when they tie. Bounds, tested as
properties, on the factor by which height is stretched against width:

- Rounding both sides down is always within the budget, and floor(v)/v > r/(r+1) for every v >= r, so the factor lies
  strictly between r/(r+1) and (r+1)/r: at most 2, and 1.1 from ten blocks on.
- Where `min_tokens` forbids rounding both down, one may go down and the other up: the square of that.
- An aspect beyond max_tokens : 1 cannot be kept by any grid: it becomes one row (or column) of max_tokens blocks.

So a strip of one pixel by N is scaled up until its short side is one block.
"""

from __future__ import annotations

import math
from functools import lru_cache

from PIL import Image

from unclipped.core.errors import ImageError
from unclipped.images.config import ImageRule

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def target_size(height: int, width: int, rule: ImageRule) -> tuple[int, int]:
    """(H, W) in px that an image of (height, width) px becomes: multiples of patch * merge.

    Raises ImageError when the rule cannot take this size (the named variants have limits of their own).
    """
    if height < 1 or width < 1:
        raise ImageError(f"image of {height}x{width} px (height x width): it has no pixels")
    if rule.size is not None:
        return rule.size
    bh, bw = rule.block
    if rule.fixed_height is not None:
        return _line_size(height, width, bh, bw, rule.min_tokens, rule.max_tokens, rule.fixed_height)
    return _NATIVE[rule.native_variant](height, width, bh, bw, rule.min_tokens, rule.max_tokens)


def grid_of(height: int, width: int, rule: ImageRule) -> tuple[int, int]:
    """(h, w) in patches of an image of (height, width) px under `rule`. Raises as `target_size`."""
    target_height, target_width = target_size(height, width, rule)
    return target_height // rule.patch_size[0], target_width // rule.patch_size[1]


def apply_rule(image: Image.Image, rule: ImageRule) -> Image.Image:
    """Resize (and pad or crop) a decoded image to its target size.

    image: mode RGB or L. Returns the same mode, of `target_size`; the image itself when it has that size already.
    """
    width, height = image.size
    target_height, target_width = target_size(height, width, rule)
    resample = RESAMPLE[rule.resample]
    if rule.rule == "pad":
        return _pad(image, target_height, target_width, rule, resample)
    if rule.rule == "crop":
        return _crop(image, target_height, target_width, rule, resample)
    return _resize(image, target_height, target_width, resample)


def _resize(image: Image.Image, height: int, width: int, resample: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), resample)


def _pad(image: Image.Image, height: int, width: int, rule: ImageRule, resample: Image.Resampling) -> Image.Image:
    """Scale to fit inside, aspect kept to the pixel, and centre on the background."""
    scale = min(height / image.height, width / image.width)
    inner_height = min(height, max(1, round(image.height * scale)))
    inner_width = min(width, max(1, round(image.width * scale)))
    inner = _resize(image, inner_height, inner_width, resample)
    if inner.size == (width, height):
        return inner
    if inner.mode == "L" and len(set(rule.background)) > 1 and rule.channels == 3:
        inner = inner.convert("RGB")  # a coloured border does not fit in luminance
    canvas = Image.new("RGB", (width, height), rule.background).convert(inner.mode)
    canvas.paste(inner, ((width - inner_width) // 2, (height - inner_height) // 2))
    return canvas


def _crop(image: Image.Image, height: int, width: int, rule: ImageRule, resample: Image.Resampling) -> Image.Image:
    """Scale until the size is covered (or the shorter side is `shorter_side`), and cut the centre."""
    if rule.shorter_side is not None:
        short = min(image.size)
        scaled_height = rule.shorter_side * image.height // short
        scaled_width = rule.shorter_side * image.width // short
    elif height * image.width >= width * image.height:  # the height is what must be reached
        scaled_height, scaled_width = height, height * image.width // image.height
    else:
        scaled_height, scaled_width = width * image.height // image.width, width
    if scaled_height * scaled_width > rule.max_pixels:
        raise ImageError(
            f"image of {image.height}x{image.width} px (height x width) would be scaled to {scaled_height}x"
            f"{scaled_width} px before the crop, over the limit of {rule.max_pixels} px: use rule pad or native"
        )
    scaled = _resize(image, scaled_height, scaled_width, resample)
    if scaled.size == (width, height):
        return scaled
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return scaled.crop((left, top, left + width, top + height))


def _area_size(height: int, width: int, bh: int, bw: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Native size by the module's rule; see its docstring for the bounds."""
    y, x = height / bh, width / bw  # sides in blocks
    scale = max(1.0, 1 / min(y, x), math.sqrt(min_tokens / (y * x)))
    scale = min(scale, math.sqrt(max_tokens / (y * x)))
    y, x = y * scale, x * scale
    slack = 1e-9  # a side that is a whole number of blocks must not be lost to rounding
    if y < 1 - slack:
        return bh, max_tokens * bw
    if x < 1 - slack:
        return max_tokens * bh, bw
    best: tuple[bool, float, int, int, int] | None = None
    for rows in {max(1, math.floor(y + slack)), math.ceil(y - slack)}:
        for columns in {max(1, math.floor(x + slack)), math.ceil(x - slack)}:
            tokens = rows * columns
            if tokens > max_tokens:
                continue
            distortion = abs(math.log(rows * x / (columns * y)))
            # Too few tokens loses to everything else; then the aspect, then the larger area decide.
            choice = (tokens < min_tokens, round(distortion, 9), -tokens, rows, columns)
            best = choice if best is None else min(best, choice)
    assert best is not None, "rounding both sides down is within the budget"
    return best[3] * bh, best[4] * bw


def _line_size(
    height: int, width: int, bh: int, bw: int, min_tokens: int, max_tokens: int, fixed_height: int
) -> tuple[int, int]:
    """Native size of a text line: the height is fixed, the width follows the aspect to the nearest block.

    A line too long for the budget is squeezed to the widest grid that the budget holds.
    """
    rows = fixed_height // bh
    most = max_tokens // rows
    least = min(most, -(-min_tokens // rows))
    columns = round(width * fixed_height / height / bw)
    return fixed_height, min(most, max(1, least, columns)) * bw


def _qwen2_vl_size(height: int, width: int, bh: int, bw: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Target size of Qwen2-VL: round each side to the block; outside the pixel range rescale by area, floor or ceil.

    Raises ImageError beyond its aspect limit of 200, and where its arithmetic leaves the budget.
    """
    if max(height, width) / min(height, width) > 200:
        raise ImageError(
            f"image of {height}x{width} px (height x width): native_variant qwen2_vl takes aspects up to 200; "
            "use native_variant area"
        )
    min_pixels, max_pixels = min_tokens * bh * bw, max_tokens * bh * bw
    target_height, target_width = round(height / bh) * bh, round(width / bw) * bw
    if target_height * target_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        target_height = max(bh, math.floor(height / shrink / bh) * bh)
        target_width = max(bw, math.floor(width / shrink / bw) * bw)
    elif target_height * target_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        target_height = math.ceil(height * grow / bh) * bh
        target_width = math.ceil(width * grow / bw) * bw
    if target_height * target_width > max_pixels:
        raise ImageError(
            f"image of {height}x{width} px (height x width): native_variant qwen2_vl gives "
            f"{target_height // bh}x{target_width // bw} tokens, over max_tokens {max_tokens}; use native_variant area"
        )
    return target_height, target_width


@lru_cache(maxsize=4096)
def _siglip2_size(height: int, width: int, bh: int, bw: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Target size of SigLIP2 NaFlex: the largest scale, found by bisection, whose sides rounded up fit the budget."""
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        rows = max(1, math.ceil(height * scale / bh))
        columns = max(1, math.ceil(width * scale / bw))
        if rows * columns <= max_tokens:
            low = scale
        else:
            high = scale
    return max(1, math.ceil(height * low / bh)) * bh, max(1, math.ceil(width * low / bw)) * bw


_NATIVE = {"area": _area_size, "qwen2_vl": _qwen2_vl_size, "siglip2": _siglip2_size}
