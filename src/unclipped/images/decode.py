"""Any image file to 8-bit RGB, upright and opaque, or one clear error that names it.

Pillow's own decompression-bomb check warns at one limit and fails at another, and is a process-wide setting. Here the
limit is an argument, it is applied to the header before anything is decoded, and the message states it.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unclipped.core.documents import regular_file
from unclipped.core.errors import ImageError
from unclipped.images.config import MAX_PIXELS, MAX_SIDE

ImageSource = str | Path | bytes | Image.Image | np.ndarray

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_limit_lock = threading.Lock()


def load_image(
    source: ImageSource,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    background: tuple[int, int, int] = (255, 255, 255),
    keep_grey: bool = False,
) -> Image.Image:
    """Decode an image: EXIF rotation applied, transparency laid on `background`, 16 bits scaled to 8, first frame.

    source: path, encoded bytes, PIL image (its current frame), or uint8 array (H, W), (H, W, 1|3|4).
    name: what messages call it (default: the path). max_pixels, max_side: refused beyond, from the header.
    keep_grey: an opaque grey image stays mode L, which is a third of the work later; all others are RGB.
    Returns mode RGB (or L). A PIL image that is upright RGB already is returned itself.
    Colour profiles are not applied.
    Raises ImageError that names the image, what is wrong and what to do.
    """
    name = name or _name_of(source)
    if isinstance(source, Image.Image):
        _check_size(source, name, max_pixels, max_side)
        return _decode(source, name, background, keep_grey)
    if isinstance(source, np.ndarray):
        image = _from_array(source, name)
        _check_size(image, name, max_pixels, max_side)
        return _to_rgb(image, name, background, keep_grey)
    with _opened(source, name) as image:
        _check_size(image, name, max_pixels, max_side)
        decoded = _decode(image, name, background, keep_grey)
        return decoded.copy() if decoded is image else decoded  # a copy holds on to no file


def _name_of(source: ImageSource) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    filename = getattr(source, "filename", None)
    return str(filename) if filename else "image in memory"


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"{name}: expected a uint8 array (height, width) or (height, width, 1, 3 or 4), found {array.dtype} "
            f"{array.shape}; scale the values to 0..255, put channels last and convert with astype('uint8')"
        )
    if 0 in array.shape:
        raise ImageError(f"{name}: the array {array.shape} has no pixels; leave it out")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


@contextmanager
def _opened(source: str | Path | bytes, name: str) -> Iterator[Image.Image]:
    """The image of a path or of bytes with only its header read; the file is closed at the end."""
    if isinstance(source, bytes):
        stream: IO[bytes] = io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        stream = _open_file(source, name)
    else:
        raise ImageError(f"{name}: expected a path, bytes, a PIL image or a uint8 array, found {type(source).__name__}")
    with stream:
        start = stream.read(16)
        if not start:
            raise ImageError(f"{name}: the file is empty (0 bytes); copy it again or leave the sample out")
        stream.seek(0)
        try:
            with _pillow_limit_lifted():
                image = Image.open(stream)
        except UnidentifiedImageError:
            raise ImageError(
                f"{name}: not an image of a known format, or cut off in its header (it starts with {start!r}); "
                "replace it by a PNG or JPEG"
            ) from None
        except Exception as error:  # format plugins raise of every kind on a broken header
            raise ImageError(
                f"{name}: the image header cannot be read ({_reason(error)}); save the image again or leave it out"
            ) from error
        yield image


def _open_file(path: str | Path, name: str) -> IO[bytes]:
    if os.path.exists(path) and not os.path.isdir(path):
        regular_file(path, ImageError)  # a pipe would be waited for, a device read without end
    try:
        return open(path, "rb")
    except FileNotFoundError:
        remedy = "download it first" if "://" in str(path) else "check the path and the folder of the images"
        raise ImageError(f"{name}: no such file; {remedy}") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, expected an image file; give the path of one image") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ImageError(f"{name}: cannot be opened ({_reason(error)}); check the path and its permissions") from None


@contextmanager
def _pillow_limit_lifted() -> Iterator[None]:
    """Read a header without Pillow's own size check, which would warn below our limit or fail above its own.

    The setting is global to Pillow, hence the lock; it is held while a header is read, not while pixels are decoded.
    """
    with _limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, name: str, max_pixels: int, max_side: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > max_side:
        raise ImageError(
            f"{name}: {height}x{width} px (height x width) is over the decompression-bomb limit of {max_pixels} pixels "
            f"or {max_side} px a side; shrink or tile the image, or raise max_pixels and max_side"
        )
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {height}x{width} px (height x width), no pixels; leave it out")


def _decode(image: Image.Image, name: str, background: tuple[int, int, int], keep_grey: bool) -> Image.Image:
    try:
        image.load()
        # A plain image without metadata cannot carry an orientation; formats may keep it outside `info`.
        if (type(image) is not Image.Image or image.info) and image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # format plugins raise of every kind on broken data
        raise ImageError(
            f"{name}: the image is truncated or damaged ({_reason(error)}); copy it again or leave the sample out"
        ) from error
    return _to_rgb(image, name, background, keep_grey)


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int], keep_grey: bool) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey_to_8_bits(image, name)
    if image.has_transparency_data:
        return _on_background(image, background)
    if image.mode in ("L", "1") and keep_grey:
        return image if image.mode == "L" else image.convert("L")
    return image.convert("RGB")


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    layer = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, background)
    opaque.paste(layer, mask=layer.getchannel("A"))
    return opaque


def _deep_grey_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits to L by rounding v * 255 / 65535 (Pillow's own conversion clips at 255 instead).

    A transparent value, when the file names one, becomes alpha (LA). Raises ImageError for values outside 16 bits and
    for floating point, whose range no file states.
    """
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no stated range; scale them to 0..255 and save as 8 bits")
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name}: 32-bit values {values.min()}..{values.max()} are outside the 16-bit range 0..65535; "
            "scale them and save as 8-bit or 16-bit grey"
        )
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
