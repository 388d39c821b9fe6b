"""The image processor: packed output, saved rule, options of one call, parity with the hub's processors."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.utils.generic import TensorType

from unclipped.core.errors import ImageError, UsageError
from unclipped.images.config import ImageRule
from unclipped.images.patches import patchify
from unclipped.models.image_processing import UnclippedImageProcessor


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def processor() -> UnclippedImageProcessor:
    return UnclippedImageProcessor(ImageRule(patch_size=14, merge=2, max_tokens=20))


def test_packed_output(processor: UnclippedImageProcessor, tmp_path: Path) -> None:
    images = [noise(40, 90), noise(200, 33, 1), noise(1, 77, 2)]
    images[1].save(tmp_path / "one.png")
    output = processor([images[0], [tmp_path / "one.png", np.asarray(images[2])]])
    assert set(output) == {"pixel_values", "image_grid_thw"} == set(processor.model_input_names)
    grids = output["image_grid_thw"]
    assert grids.dtype == torch.int64
    assert output["pixel_values"].shape == (int(grids.prod(1).sum()), 3 * 14 * 14)
    parts = output["pixel_values"].split(grids.prod(1).tolist())
    for image, part, grid in zip(images, parts, grids.tolist(), strict=True):
        alone = processor(image, return_tensors="pt")
        assert torch.equal(alone["pixel_values"], part)
        assert alone["image_grid_thw"].tolist() == [grid]
        assert grid[1:] == list(processor.grid_of(image.height, image.width))
        assert processor.get_number_of_image_patches(image.height, image.width) == len(part)
        assert grid[1] * grid[2] // 4 <= 20


def test_forms_of_input(processor: UnclippedImageProcessor) -> None:
    array = np.asarray(noise(30, 40))
    expected = processor(Image.fromarray(array))["pixel_values"]
    for form in (array, [array], [[array]], array[None]):
        assert torch.equal(processor(form)["pixel_values"], expected)
    as_numpy = processor(array, return_tensors="np")
    assert isinstance(as_numpy["pixel_values"], np.ndarray)
    assert np.array_equal(as_numpy["pixel_values"], expected.numpy())
    none = processor([])
    assert none["pixel_values"].shape == (0, 588)
    assert none["image_grid_thw"].shape == (0, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"patch_size": (32, 8), "merge": (1, 2), "fixed_height": 32, "channels": 1, "max_tokens": 99},
        {"rule": "crop", "size": 224, "shorter_side": 256, "patch_size": 14, "mean": (0.1, 0.2, 0.3)},
        {"rule": "pad", "size": (64, 32), "background": (1, 2, 3), "resample": "bilinear", "max_pixels": 10_000},
        {"native_variant": "qwen2_vl", "min_tokens": 2},
    ],
)
def test_saved_and_loaded(fields: dict[str, Any], tmp_path: Path) -> None:
    processor = UnclippedImageProcessor(**fields)
    assert processor.image_rule == ImageRule(**fields)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "UnclippedImageProcessor"
    assert ImageRule(**{key: value for key, value in saved.items() if key != "image_processor_type"}) == (
        processor.image_rule
    )
    loaded = UnclippedImageProcessor.from_pretrained(tmp_path)
    assert loaded.image_rule == processor.image_rule
    image = noise(50, 60)
    assert torch.equal(loaded(image)["pixel_values"], processor(image)["pixel_values"])
    for twin in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert twin.image_rule == loaded.image_rule


def test_fields_are_attributes_and_options(processor: UnclippedImageProcessor, tmp_path: Path) -> None:
    image = noise(300, 300)
    full = processor(image)["image_grid_thw"]
    small = processor(image, max_tokens=4)["image_grid_thw"]
    assert small.tolist() == [[1, 4, 4]]
    assert torch.equal(processor(image)["image_grid_thw"], full)  # an option of one call lasts for one call
    assert processor.get_number_of_image_patches(300, 300, {"max_tokens": 4}) == 16
    assert processor.max_tokens == 20
    processor.max_tokens = 4
    assert torch.equal(processor(image)["image_grid_thw"], small)
    processor.save_pretrained(tmp_path)
    assert UnclippedImageProcessor.from_pretrained(tmp_path).max_tokens == 4
    assert UnclippedImageProcessor.from_pretrained(tmp_path, max_tokens=9).max_tokens == 9
    with pytest.raises(AttributeError, match="do_pad"):
        _ = processor.do_pad


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_token": 3}, "did you mean 'max_tokens'"),
        ({"max_tokens": "many"}, "max_tokens: "),
        ({"rule": "sqash"}, "rule: "),
        ({"rule": "squash"}, "needs a size"),
        ({"merge": {"rows": 2}}, "merge: "),
        ({"mean": [[0.5], 0.5]}, "mean"),
        ({"std": "wide"}, "std: "),
    ],
)
def test_wrong_options(fields: dict[str, Any], part: str, processor: UnclippedImageProcessor) -> None:
    for call in (lambda: UnclippedImageProcessor(**fields), lambda: processor(noise(8, 8), **fields)):
        with pytest.raises(UsageError) as caught:
            call()
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bad_images_are_named(processor: UnclippedImageProcessor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        processor([noise(8, 8), tmp_path / "missing.png"])
    with pytest.raises(ImageError, match="image 1: expected a uint8 array"):
        processor([noise(8, 8), np.zeros((4, 4, 3), dtype=np.int64)])
    with pytest.raises(ImageError, match="found None"):
        processor([None])
    with pytest.raises(ImageError, match=r"image 0: .* limit of 63 pixels"):
        processor(noise(8, 8), max_pixels=63)
    with pytest.raises(UsageError, match="expected 'pt' or 'np'"):
        processor(noise(8, 8), return_tensors="tf")


def test_options_pass_the_type_check_of_a_composite_processor() -> None:
    options = {"max_tokens": 4, "size": [32, 32], "resample": "bilinear", "patch_size": (8, 4), "mean": 0.5}
    validate_typed_dict(UnclippedImageProcessor.valid_kwargs, options)


def test_paths_are_fetched_by_our_rules(tmp_path: Path) -> None:
    processor = UnclippedImageProcessor(patch_size=8, background=(0, 255, 0))
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    image = noise(8, 8)
    fetched = processor.fetch_images([[str(tmp_path / "clear.png")], image])
    assert fetched[1] is image
    for colour in ((0, 255, 0), (0, 0, 255)):  # of the call, whatever the processor was made with
        planes = processor(fetched[0], background=colour)["pixel_values"].unflatten(1, (3, 64))[0, :, 0]
        assert ((planes + 1) * 127.5).tolist() == list(colour)


@pytest.mark.parametrize(("height", "width"), [(97, 130), (300, 224), (56, 56), (20, 900)])
def test_parity_with_qwen2_vl(height: int, width: int) -> None:
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 784, "longest_edge": 100 * 784})
    ours = UnclippedImageProcessor(
        native_variant="qwen2_vl",
        patch_size=14,
        merge=2,
        min_tokens=4,
        max_tokens=100,
        mean=theirs.image_mean,
        std=theirs.image_std,
    )
    image = noise(height, width)
    mine, other = ours(image), theirs(image, return_tensors="pt")
    assert torch.equal(mine["image_grid_thw"], other["image_grid_thw"])
    _, h, w = mine["image_grid_thw"][0].tolist()
    # They order patches by 2x2 merge blocks and repeat every frame: (h/2, w/2, 2, 2, C, 2, ph, pw).
    blocks = other["pixel_values"].reshape(h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    row_major = blocks.permute(0, 2, 1, 3, 4, 5, 6).reshape(h * w, -1)
    torch.testing.assert_close(mine["pixel_values"], row_major, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(97, 130), (300, 224), (20, 900)])
def test_parity_with_siglip2(height: int, width: int) -> None:
    image = noise(height, width)
    other = Siglip2ImageProcessorPil(max_num_patches=64)(image, return_tensors="pt")
    mine = UnclippedImageProcessor(native_variant="siglip2", patch_size=16, max_tokens=64, resample="bilinear")(image)
    assert mine["image_grid_thw"][0, 1:].tolist() == other["spatial_shapes"][0].tolist()
    count = len(mine["pixel_values"])
    # Their values run row, column, channel, and the rows are padded.
    values = other["pixel_values"][0, :count].reshape(count, 16, 16, 3).permute(0, 3, 1, 2).reshape(count, -1)
    torch.testing.assert_close(mine["pixel_values"], values, atol=1e-5, rtol=0)


# What other image processors take


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_and_tensors_of_either_layout_are_the_image(channels: int, processor: UnclippedImageProcessor) -> None:
    last = np.random.default_rng(0).integers(0, 256, (30, 40, channels), dtype=np.uint8)
    first = np.ascontiguousarray(last.transpose(2, 0, 1))
    expected = processor(Image.fromarray(last[..., 0] if channels == 1 else last))["pixel_values"]
    forms = [last, first, torch.from_numpy(last), torch.from_numpy(first), torch.from_numpy(first)[None], first[None]]
    for form in forms:
        assert torch.equal(processor(form)["pixel_values"], expected)
        assert torch.equal(processor(form, do_convert_rgb=True)["pixel_values"], expected)
    assert processor([[forms[0], forms[1]], forms[2]])["image_grid_thw"].shape == (3, 3)


def test_floats_are_the_bytes_that_they_were_made_of(processor: UnclippedImageProcessor) -> None:
    image = np.array(noise(30, 40))
    expected = processor(image)["pixel_values"]
    for kind in (np.float32, np.float64):
        assert torch.equal(processor(image.astype(kind))["pixel_values"], expected)
        unit = image.astype(kind) / 255
        assert torch.equal(processor(unit, do_rescale=False)["pixel_values"], expected)
        assert torch.equal(processor(unit, rescale_factor=1.0)["pixel_values"], expected)
        tensor = torch.from_numpy(unit).permute(2, 0, 1)
        assert torch.equal(processor([tensor], do_rescale=False)["pixel_values"], expected)
    halves = torch.from_numpy(image).permute(2, 0, 1).to(torch.bfloat16)  # 8 bits of mantissa: whole numbers to 256
    assert torch.equal(processor(halves)["pixel_values"], expected)


def test_where_both_axes_could_be_channels_the_library_or_the_option_decides(
    processor: UnclippedImageProcessor,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 3), dtype=np.uint8)
    as_last = processor(Image.fromarray(pixels))["pixel_values"]
    as_first = processor(Image.fromarray(pixels.transpose(1, 2, 0).copy()))["pixel_values"]
    assert as_last.shape != as_first.shape or not torch.equal(as_last, as_first)
    for form, expected in ((pixels, as_last), (torch.from_numpy(pixels), as_first)):
        assert torch.equal(processor(form)["pixel_values"], expected)
        assert torch.equal(processor(form, input_data_format="channels_last")["pixel_values"], as_last)
        assert torch.equal(processor(form, input_data_format=ChannelDimension.FIRST)["pixel_values"], as_first)
    with pytest.raises(UsageError, match="input_data_format"):
        processor(pixels, input_data_format="channels_middle")


def test_steps_can_be_left_out() -> None:
    plain = UnclippedImageProcessor(patch_size=8, mean=0.4, std=0.2)
    image = noise(16, 24)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    deviation = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)[:, None, None]
    for options, expected in (
        ({}, (values / 255 - 0.4) / 0.2),
        ({"do_normalize": False}, values / 255),
        ({"do_rescale": False}, (values - 0.4) / 0.2),
        ({"do_rescale": False, "do_normalize": False}, values),
        ({"rescale_factor": 1 / 127.5, "do_normalize": False}, values / 127.5),
        ({"image_mean": 0.1, "image_std": [0.1, 0.2, 0.5]}, (values / 255 - 0.1) / deviation),
    ):
        found = plain(image, **options)["pixel_values"]
        torch.testing.assert_close(found.double(), patchify(expected, (8, 8)), atol=2e-4, rtol=1e-5)
        made = UnclippedImageProcessor(patch_size=8, **{"image_mean": 0.4, "image_std": 0.2, **options})
        assert torch.equal(made(image)["pixel_values"], found)
    squashed = UnclippedImageProcessor(rule="squash", size={"height": 32, "width": 16}, patch_size=8)
    assert squashed.size == (32, 16)
    assert squashed(image)["image_grid_thw"].tolist() == [[1, 4, 2]]
    assert squashed(image, size={"height": 8, "width": 16})["image_grid_thw"].tolist() == [[1, 1, 2]]
    kept = squashed(image, do_resize=False)
    assert kept["image_grid_thw"].tolist() == [[1, 2, 3]]
    assert torch.equal(kept["pixel_values"], UnclippedImageProcessor(patch_size=8)(image)["pixel_values"])


def test_switches_are_attributes_and_are_saved(tmp_path: Path) -> None:
    processor = UnclippedImageProcessor.from_dict({"patch_size": 8, "image_mean": 0.3}, do_convert_rgb=False)
    assert (processor.do_convert_rgb, processor.do_resize, processor.rescale_factor) == (False, True, 1 / 255)
    assert processor.image_mean == processor.mean == (0.3, 0.3, 0.3)
    processor.do_rescale = False
    processor.save_pretrained(tmp_path)
    loaded = UnclippedImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.do_convert_rgb, loaded.do_rescale, loaded.do_normalize) == (False, False, True)
    assert pickle.loads(pickle.dumps(loaded)).do_rescale is False


def test_device_and_kind_of_tensors() -> None:
    processor = UnclippedImageProcessor(patch_size=8)
    assert processor(noise(8, 8), device="meta")["pixel_values"].device.type == "meta"
    assert (
        processor(noise(8, 8), device=torch.device("cpu"), return_tensors=TensorType.PYTORCH)["pixel_values"].ndim == 2
    )


@pytest.mark.parametrize(
    ("image", "options", "part"),
    [
        (np.zeros((4, 4, 3), dtype=np.int64), {}, "image 0: expected a uint8 array"),
        (np.zeros((5, 5, 2), dtype=np.uint8), {}, "image 0: expected a uint8 array"),
        (torch.zeros(4, dtype=torch.uint8), {}, "image 0: expected a uint8 array"),
        (np.full((4, 4, 3), 256.0), {}, "image 0: floats from 256 to 256"),
        (np.full((4, 4, 3), -1.0), {}, "once rescaled"),
        (np.full((4, 4, 3), np.nan), {}, "once rescaled"),
        (np.full((4, 4, 3), 0.5), {}, "give do_rescale=False"),
        (np.full((4, 4, 3), 2.0), {"do_rescale": False}, "once rescaled"),
        (Image.new("RGBA", (8, 8)), {"do_convert_rgb": False}, "image 0: has 4 channels"),
        (Image.new("RGB", (8, 9)), {"do_resize": False}, "image 0: 9x8 px"),
        (Image.new("RGB", (8, 8)), {"size": {"shortest_edge": 8}}, "size: expected 'height' and 'width'"),
        (Image.new("RGB", (8, 8)), {"do_pad": True}, "unknown image option 'do_pad'"),
        (Image.new("RGB", (8, 8)), {"do_center_crop": True}, "unknown image option 'do_center_crop'"),
        (Image.new("RGB", (8, 8)), {"image_mean": 0.5, "mean": 0.5}, "are the same field"),
        (Image.new("RGB", (8, 8)), {"rescale_factor": 0}, "rescale_factor: "),
        (Image.new("RGB", (8, 8)), {"do_rescale": "perhaps"}, "do_rescale: "),
        (Image.new("RGB", (8, 8)), {"device": "nowhere"}, "device='nowhere'"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_in_one_line(image: Any, options: dict[str, Any], part: str) -> None:
    with pytest.raises((ImageError, UsageError)) as caught:
        UnclippedImageProcessor(patch_size=8)(image, **options)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_announced_is_taken() -> None:
    values: dict[str, Any] = {
        **UnclippedImageProcessor(rule="crop", size=16, shorter_side=16, patch_size=8).image_rule.model_dump(),
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": 0.5, "image_std": 0.5,
        "input_data_format": "channels_last", "device": "cpu", "return_tensors": "pt",
    }  # fmt: skip
    announced = set(UnclippedImageProcessor.valid_kwargs.__annotations__)
    assert announced == set(values)
    processor = UnclippedImageProcessor(rule="crop", size=16, shorter_side=16, patch_size=8)
    expected = processor(noise(20, 20))["pixel_values"]
    for name, value in values.items():
        if value is not None and name not in ("min_tokens", "max_tokens"):
            assert torch.equal(processor(np.asarray(noise(20, 20)), **{name: value})["pixel_values"], expected), name


def test_inline_addresses_are_decoded_as_files_are(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    processor = UnclippedImageProcessor(patch_size=8, background=(0, 255, 0))
    address = "data:image/png;base64," + base64.b64encode((tmp_path / "clear.png").read_bytes()).decode()
    expected = processor(tmp_path / "clear.png")["pixel_values"]
    assert torch.equal(processor(processor.fetch_images([address]))["pixel_values"], expected)
    with pytest.raises(ImageError, match="expected data:image"):
        processor.fetch_images("data:image/png,abc")
