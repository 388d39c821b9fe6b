"""Decoding: every kind of file comes out as upright, opaque 8-bit RGB, or as one error that names it."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclipped.core.errors import ImageError
from unclipped.images.decode import load_image

LEFT, RIGHT = (200, 30, 30), (20, 40, 220)
BACKGROUND = (10, 200, 60)


def two_colours(height: int = 20, width: int = 30) -> Image.Image:
    """Left half red, right half blue."""
    array = np.empty((height, width, 3), np.uint8)
    array[:, : width // 2], array[:, width // 2 :] = LEFT, RIGHT
    return Image.fromarray(array)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    return value if isinstance(value, tuple) else (value,)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(height: int, width: int) -> bytes:
    """A PNG that states a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = two_colours()
    path = saved(image, tmp_path / "a.png")
    expected = np.asarray(image)
    for source in (path, str(path), path.read_bytes(), image, expected, Image.open(path)):
        decoded = load_image(source)
        assert decoded.mode == "RGB"
        assert np.array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(orientation: int, tmp_path: Path) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    # What a camera stores so that the orientation, applied to it, gives the upright picture.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "a.png", exif=exif)
    once = load_image(path)
    assert np.array_equal(np.asarray(once), upright)
    assert np.array_equal(np.asarray(load_image(once)), upright)
    assert np.array_equal(np.asarray(load_image(Image.open(path))), upright)


def test_transparency_is_laid_on_the_background(tmp_path: Path) -> None:
    rgba = two_colours().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(np.arange(30) < 15, 0, 255)[None].repeat(20, 0).astype(np.uint8)))
    decoded = load_image(saved(rgba, tmp_path / "rgba.png"), background=BACKGROUND)
    assert pixel(decoded, 2, 2) == BACKGROUND
    assert pixel(decoded, 28, 2) == RIGHT
    half = Image.new("RGBA", (4, 4), (100, 0, 0, 128))
    assert pixel(load_image(half, background=(0, 0, 0)), 0, 0) == (50, 0, 0)
    grey = Image.new("LA", (4, 4), (90, 0))
    assert (
        pixel(load_image(saved(grey, tmp_path / "la.png"), background=BACKGROUND, keep_grey=True), 0, 0) == BACKGROUND
    )
    assert pixel(load_image(Image.new("LA", (4, 4), (90, 255))), 0, 0) == (90, 90, 90)


def test_palettes(tmp_path: Path) -> None:
    palette = two_colours().quantize(2)
    decoded = load_image(saved(palette, tmp_path / "p.png"))
    assert (pixel(decoded, 0, 0), pixel(decoded, 29, 0)) == (LEFT, RIGHT)
    index = palette.getpixel((0, 0))
    for transparency in (index, bytes(0 if i == index else 255 for i in range(2))):
        path = saved(palette, tmp_path / "pt.png", transparency=transparency)
        decoded = load_image(path, background=BACKGROUND)
        assert (pixel(decoded, 0, 0), pixel(decoded, 29, 0)) == (BACKGROUND, RIGHT)


def test_transparent_colour_of_a_file_without_alpha(tmp_path: Path) -> None:
    path = saved(two_colours(), tmp_path / "keyed.png", transparency=LEFT)
    decoded = load_image(path, background=BACKGROUND)
    assert (pixel(decoded, 0, 0), pixel(decoded, 29, 0)) == (BACKGROUND, RIGHT)


def test_cmyk(tmp_path: Path) -> None:
    path = saved(two_colours(32, 32).convert("CMYK"), tmp_path / "a.jpg", quality=100)
    decoded = load_image(path)
    assert np.abs(np.subtract(pixel(decoded, 2, 2), LEFT)).max() < 12
    assert np.abs(np.subtract(pixel(decoded, 29, 29), RIGHT)).max() < 12


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)
    path = saved(Image.fromarray(values), tmp_path / f"deep.{kind}")
    expected = np.round(values / 257).astype(np.uint8)
    decoded = np.asarray(load_image(path))
    assert np.array_equal(decoded, expected[..., None].repeat(3, 2))
    assert np.array_equal(np.asarray(load_image(path, keep_grey=True)), expected)
    wide = Image.fromarray(values.astype(np.int32))  # mode I
    assert np.array_equal(np.asarray(load_image(wide, keep_grey=True)), expected)
    assert np.array_equal(np.asarray(load_image(Image.fromarray(values.astype(">u2")), keep_grey=True)), expected)


def test_sixteen_bit_transparent_value() -> None:
    values = np.array([[1000, 1001]], np.uint16)
    image = Image.fromarray(values)
    image.info["transparency"] = 1001
    decoded = load_image(image, background=BACKGROUND)
    assert (pixel(decoded, 0, 0), pixel(decoded, 1, 0)) == ((4, 4, 4), BACKGROUND)


def test_one_bit_and_grey(tmp_path: Path) -> None:
    bits = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    path = saved(bits, tmp_path / "bits.png")
    assert np.array_equal(np.asarray(load_image(path, keep_grey=True)), np.eye(8, dtype=np.uint8) * 255)
    assert load_image(path).mode == "RGB"
    assert load_image(np.zeros((4, 4), np.uint8)).mode == "RGB"
    assert load_image(np.zeros((4, 4, 1), np.uint8), keep_grey=True).mode == "L"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in (LEFT, RIGHT, LEFT)]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = saved(frames[0], tmp_path / f"a.{kind.lower()}", save_all=True, append_images=frames[1:], **options)
    decoded = load_image(path)
    assert pixel(decoded, 5, 5) == LEFT
    assert pixel(load_image(decoded), 5, 5) == LEFT  # nothing is left to read from the closed file


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_named(kind: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for share in (0.05, 0.5, 0.9):
        path = tmp_path / f"cut-{share}.{kind.lower()}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    cases = [
        (tmp_path / "missing.png", "no such file; check the path"),
        ("https://example.org/a.png", "download it first"),
        (tmp_path / "empty.png", "empty (0 bytes)"),
        (tmp_path / "page.png", "starts with b'<html>"),
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "header.png", "header.png: "),
        ("a\0b.png", "cannot be opened"),
        (b"", "image of 0 bytes: the file is empty"),
        (b"nonsense", "not an image"),
    ]
    for source, part in cases:
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert part in str(caught.value), str(caught.value)
        if isinstance(source, Path):
            assert str(source) in str(caught.value)
    with pytest.raises(ImageError, match=r"^sample 7: "):
        load_image(b"nonsense", name="sample 7")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (np.zeros((4, 4, 3), np.float32), "found float32"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((4, 0, 3), np.uint8), "no pixels"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "no stated range"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "0..65535"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "0..65535"),
        (17, "found int"),
    ],
)
def test_bad_objects(source: object, part: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert part in str(caught.value)


@pytest.mark.parametrize(("height", "width"), [(30_000, 30_000), (30_000, 10), (1, 30_000), (9_000, 9_000)])
def test_bombs_are_refused_from_the_header(height: int, width: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(height, width))  # decoding it would fail with another message
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            load_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert f"{height}x{width} px" in message
    assert "67108864 pixels" in message
    assert "20000 px" in message
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_can_be_raised_beyond_that_of_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(two_colours(), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).size == (30, 20)
        with pytest.raises(ImageError, match="limit of 599 pixels"):
            load_image(path, max_pixels=599)
        with pytest.raises(ImageError, match="limit of 599 pixels"):
            load_image(two_colours(), max_pixels=599)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_threads_leave_the_limit_of_pillow_alone(tmp_path: Path) -> None:
    path = saved(two_colours(), tmp_path / "a.png")
    limit = Image.MAX_IMAGE_PIXELS
    threads = [threading.Thread(target=lambda: [load_image(path) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limit == Image.MAX_IMAGE_PIXELS
