"""One door: whoever asks for an image of a file gets the same pixels of it, for every field of the rule."""

from __future__ import annotations

import ast
import base64
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from support.tiny_models import tiny_tokenizer
from unclipped.audit.features import RawPixels, digests_of, extract
from unclipped.audit.fine_tuning import Pictures
from unclipped.core.errors import ImageError
from unclipped.data.augment import augment
from unclipped.data.blank import with_blank_images
from unclipped.data.config import AugmentConfig
from unclipped.data.sample import ImagePart, Sample, SampleGroup
from unclipped.encoding.collate import Collator, collate_prompts
from unclipped.encoding.examples import encode, encode_prompt
from unclipped.images.config import ImageRule
from unclipped.images.patches import patchify
from unclipped.images.prepare import decoded, normalised, pixels, prepare
from unclipped.inference.chat import Conversation
from unclipped.inference.engine import Engine
from unclipped.models.image_processing import UnclippedImageProcessor
from unclipped.models.processing import UnclippedProcessor

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "unclipped"
TOKENIZER = tiny_tokenizer()
UNCHANGED = AugmentConfig.model_validate({"steps": [{"kind": "geometric", "scale": 0, "shift": 0}]})


def processor_of(rule: ImageRule) -> Any:
    return UnclippedProcessor(UnclippedImageProcessor(rule), TOKENIZER, connector="linear")


def engine_of(rule: ImageRule) -> Engine:
    engine = Engine.__new__(Engine)  # without weights, which prepare nothing
    engine.model = SimpleNamespace(config=PreTrainedConfig())  # names no positions, so no prompt is too long
    engine.processor = processor_of(rule)
    return engine


def sample_of(path: Path) -> Sample:
    return Sample.qa("a", [ImagePart(str(path))], "what", "red")


def train(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    processor = processor_of(rule)
    return Collator.for_processor(processor)([encode(sample_of(path), processor)])["pixel_values"]


def train_shared(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    return encode(SampleGroup((sample_of(path), sample_of(path))), processor_of(rule)).pixel_values  # type: ignore[return-value]


def train_augmented(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    item = augment(sample_of(path), UNCHANGED, np.random.default_rng(0))
    return encode(item, processor_of(rule)).pixel_values  # type: ignore[return-value]


def evaluate(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    processor = processor_of(rule)
    return collate_prompts([encode_prompt(sample_of(path), processor)], processor)["pixel_values"]


def chat(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    conversation = Conversation(engine_of(rule), [path])
    return conversation.engine.encode(Sample.qa("a", conversation.waiting, "what", None)).pixel_values  # type: ignore[return-value]


def serve(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    address = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "what"}]
    return engine_of(rule).encode([{"role": "user", "content": content}]).pixel_values  # type: ignore[return-value]


def probe(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    parts = [ImagePart(path)]
    return extract(RawPixels(rule), parts, digests_of(parts), folder / "cache", kind="patches")["patches"][0]


def fine_tune(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return Pictures([ImagePart(path)], [0], rule).batch([0], pool)[0]


def through_transformers(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    text = "<|user|><|image|>what<|assistant|>"
    return processor_of(rule)(text=text, images=[str(path)], return_tensors="pt")["pixel_values"]


def through_chat_template(path: Path, rule: ImageRule, folder: Path) -> Tensor:
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "what"}]
    return processor_of(rule).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )["pixel_values"]


CALLERS: tuple[Callable[[Path, ImageRule, Path], Tensor], ...] = (
    train,
    train_shared,
    train_augmented,
    evaluate,
    chat,
    serve,
    probe,
    fine_tune,
    through_transformers,
    through_chat_template,
)


def noise(height: int, width: int, channels: int, top: int = 256) -> np.ndarray:
    kind = np.uint8 if top == 256 else np.uint16
    return np.random.default_rng(0).integers(0, top, (height, width, channels), dtype=kind)


def turned(path: Path) -> None:
    image = Image.fromarray(noise(20, 34, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def with_palette(path: Path) -> None:
    image = Image.fromarray(noise(20, 34, 3)).quantize(16)
    image.save(path, transparency=3)


def animated(path: Path) -> None:
    first, second = (Image.fromarray(noise(20, 34, 3) // divisor) for divisor in (1, 2))
    first.save(path, format="PNG", save_all=True, append_images=[second])


def deep(path: Path) -> None:
    Image.fromarray(noise(20, 34, 1, 65536)[..., 0]).save(path)


def grey(path: Path) -> None:
    Image.fromarray(noise(20, 34, 1)[..., 0]).save(path)


def grey_and_alpha(path: Path) -> None:
    Image.fromarray(noise(20, 34, 2)).save(path)


def one_bit(path: Path) -> None:
    Image.fromarray(noise(20, 34, 1)[..., 0]).convert("1").save(path)


def long(path: Path) -> None:
    Image.new("RGBA", (20_001, 1), (40, 90, 200, 99)).save(path)


def cut(path: Path) -> None:
    turned(path)
    path.write_bytes(path.read_bytes()[:-900])


FIELDS: dict[str, dict[str, Any]] = {
    "rule": {"rule": "pad", "size": 32},
    "size": {"rule": "squash", "size": (16, 32)},
    "patch_size": {"patch_size": (8, 4)},
    "merge": {"merge": (2, 1)},
    "min_tokens": {"min_tokens": 20},
    "max_tokens": {"max_tokens": 1},
    "fixed_height": {"fixed_height": 32},
    "native_variant": {"native_variant": "siglip2", "max_tokens": 9},
    "shorter_side": {"rule": "crop", "size": 32, "shorter_side": 48},
    "mean": {"mean": 0.3},
    "std": {"std": (0.1, 0.2, 0.3)},
    "channels": {"channels": 1},
    "resample": {"resample": "bilinear"},
    "background": {"background": (9, 80, 200)},
    "max_pixels": {"max_pixels": 100},
    "max_side": {"max_side": 20_001},
}


def outcome(caller: Callable[..., Tensor], path: Path, rule: ImageRule, folder: Path) -> Tensor | str:
    try:
        return caller(path, rule, folder)
    except ImageError as error:
        return str(error)


def test_every_field_of_the_rule_is_tried() -> None:
    assert set(FIELDS) == set(ImageRule.model_fields)


@pytest.mark.parametrize("field", FIELDS)
def test_all_callers_get_the_same_pixels_under_each_field_of_the_rule(field: str, tmp_path: Path) -> None:
    path, rule = tmp_path / "a.png", ImageRule(**FIELDS[field])
    (long if field == "max_side" else turned)(path)
    expected = outcome(lambda *_: prepare(ImagePart(path), rule).patches, path, rule, tmp_path)
    plain = outcome(lambda *_: prepare(ImagePart(path), ImageRule()).patches, path, rule, tmp_path)
    for caller in CALLERS:
        found = outcome(caller, path, rule, tmp_path)
        if isinstance(expected, str):
            assert isinstance(found, str), caller.__name__
            assert "limit of 100 pixels" in found, caller.__name__
        else:
            assert isinstance(found, Tensor), (caller.__name__, found)
            assert torch.equal(found, expected), caller.__name__
            # The field matters here, or the comparison would say nothing.
            assert isinstance(plain, str) or plain.shape != expected.shape or not torch.equal(plain, expected)


@pytest.mark.parametrize("make", [turned, with_palette, animated, deep, grey, grey_and_alpha, one_bit, cut])
@pytest.mark.parametrize("channels", [3, 1])
def test_all_callers_get_the_same_pixels_of_each_kind_of_file(
    make: Callable[[Path], None], channels: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    make(path)
    rule = ImageRule(rule="pad", size=(32, 32), patch_size=(8, 8), background=(9, 80, 200), channels=channels)  # type: ignore[arg-type]
    expected = outcome(lambda *_: prepare(ImagePart(path), rule).patches, path, rule, tmp_path)
    assert isinstance(expected, str) == (make is cut)
    for caller in CALLERS:
        found = outcome(caller, path, rule, tmp_path)
        if make is cut:
            assert isinstance(found, str), caller.__name__
            assert "truncated" in found, caller.__name__
        else:
            assert isinstance(found, Tensor), (caller.__name__, found)
            assert torch.equal(found, expected), caller.__name__  # type: ignore[arg-type]
    if make is not cut:  # what objectives cut crops from: the same bytes, normalised with one operation more
        planes = torch.tensor(pixels(ImagePart(path), rule)).permute(2, 0, 1)
        torch.testing.assert_close(
            patchify(normalised(planes, rule), (8, 8)),
            expected,
            atol=1e-5,
            rtol=0,
        )
        again = ImagePart(decoded(ImagePart(path), rule))
        assert torch.equal(prepare(again, rule).patches, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", FIELDS)
def test_a_blank_image_has_the_grid_of_the_real_one_under_each_field(field: str, tmp_path: Path) -> None:
    path, rule = tmp_path / "a.png", ImageRule(**FIELDS[field])
    (long if field == "max_side" else turned)(path)
    for sample in (sample_of(path), augment(sample_of(path), UNCHANGED, np.random.default_rng(0))):
        (part,) = with_blank_images(sample, (0.5, 0.5, 0.5)).images
        if field == "max_pixels":
            with pytest.raises(ImageError, match="limit of 100 pixels"):
                prepare(part, rule)
        else:
            assert prepare(part, rule).grids == prepare(ImagePart(path), rule).grids


def test_a_device_or_a_pipe_as_an_image_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (Path("/dev/zero"), tmp_path / "pipe.png"):
        for caller in CALLERS:
            if caller is serve:
                continue  # has the bytes already
            with pytest.raises(ImageError, match="is no regular file"):
                caller(path, ImageRule(rule="squash", size=(32, 32)), tmp_path)


# Who may open an image

OPENERS = {"load_image", "imread", "decode_image", "apply_rule"}


def test_images_are_opened_in_one_room() -> None:
    """Elsewhere nobody opens a file as an image or resizes by a rule; headers and label maps have functions."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] == "images":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            imported = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            opens = isinstance(node, ast.Attribute) and node.attr == "open" and "Image" in ast.unparse(node.value)
            if opens or imported & OPENERS:
                found.append(f"{place}, line {getattr(node, 'lineno', 0)}")
    assert not found, f"use unclipped.images.prepare: {found}"
