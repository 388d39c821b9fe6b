"""Frozen features: what they are; the cache gives them back, goes on where it stopped and never serves stale ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import unclipped.audit.features as module
from support.tiny_models import tiny_encoder, tiny_image, tiny_lm
from unclipped.audit.features import (
    EncoderExtractor,
    Kind,
    RawPixels,
    digests_of,
    extract,
    probe_rule,
    random_weights,
    raw_rule,
)
from unclipped.core.errors import ImageError, UnclippedError, UsageError
from unclipped.data.sample import ImagePart
from unclipped.encoders.build import load_encoder
from unclipped.images.patches import patchify, unpatchify
from unclipped.images.prepare import prepare


@pytest.fixture
def extractor(tmp_path: Path) -> EncoderExtractor:
    encoder, _ = load_encoder(str(tiny_encoder(tmp_path / "vision", seed=7)))
    return EncoderExtractor(encoder, probe_rule(encoder, None, "squash"))


@pytest.fixture
def parts() -> list[ImagePart]:
    return [ImagePart(tiny_image(20, 24, offset=number), f"image {number}") for number in range(10)]


def take(extractor: EncoderExtractor | RawPixels, parts: list[ImagePart], folder: Path, kind: Kind = "pooled") -> dict:
    return extract(extractor, parts, digests_of(parts), folder, kind=kind, batch_size=4)


@torch.no_grad()
def test_features_are_the_encoders(extractor: EncoderExtractor, parts: list[ImagePart], tmp_path: Path) -> None:
    found = take(extractor, parts, tmp_path / "features")
    patches = torch.stack([prepare(part, extractor.rule).patches for part in parts])  # (10, 4, values)
    grids = torch.tensor([[1, 2, 2]] * len(parts))
    last = extractor.encoder(patches.flatten(0, 1), grids).view(10, 4, -1)
    planes = unpatchify(patches, (2, 2), (8, 8))
    output = extractor.encoder.model(planes, output_hidden_states=True)
    assert found["pooled"].shape == (10, 2, 32)  # of four blocks this encoder has two
    torch.testing.assert_close(found["mean_patch"], last.mean(dim=1))
    torch.testing.assert_close(found["pooled"][:, 0], output.last_hidden_state[:, 0])
    torch.testing.assert_close(found["pooled"][:, 1], output.hidden_states[1][:, 0])
    torch.testing.assert_close(take(extractor, parts, tmp_path / "features", "patches")["patches"], last)


def test_encoders_without_class_token_are_pooled_by_their_mean(parts: list[ImagePart], tmp_path: Path) -> None:
    tiny_lm(tmp_path / "lm")
    encoder, _ = load_encoder(f"llm:{tmp_path / 'lm'}", patch_size=8)
    extractor = EncoderExtractor(encoder, probe_rule(encoder, 16, "squash"))
    found = take(extractor, parts, tmp_path / "features")
    assert set(found) == {"pooled"}
    patches = take(extractor, parts, tmp_path / "features", "patches")["patches"]
    torch.testing.assert_close(found["pooled"][:, 0], patches.mean(dim=1))


def test_raw_pixels_are_the_image(extractor: EncoderExtractor, parts: list[ImagePart], tmp_path: Path) -> None:
    raw = RawPixels(raw_rule(extractor.rule, 6))
    assert take(raw, parts, tmp_path)["pooled"].shape == (10, 1, 3 * 6 * 6)
    whole = RawPixels(extractor.rule)
    patches = take(whole, parts, tmp_path, "patches")["patches"]
    planes = unpatchify(patches, (2, 2), (8, 8))
    torch.testing.assert_close(patchify(planes, (8, 8)), patches)


class Counted(EncoderExtractor):
    """Counts images, and stops as Ctrl-C does after so many."""

    images, stop_after = 0, 10**6

    def __call__(self, patches: Tensor, kind: Kind) -> dict[str, Tensor]:
        if self.images + len(patches) > self.stop_after:
            raise KeyboardInterrupt
        self.images += len(patches)
        return super().__call__(patches, kind)


def counted(extractor: EncoderExtractor) -> Counted:
    return Counted(extractor.encoder, extractor.rule)


def test_an_interrupted_extraction_goes_on(
    extractor: EncoderExtractor, parts: list[ImagePart], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    whole = take(extractor, parts, tmp_path / "unbroken")
    first = counted(extractor)
    first.stop_after = 9
    with pytest.raises(KeyboardInterrupt):
        take(first, parts, tmp_path / "features")
    assert first.images == 8
    second = counted(extractor)
    resumed = take(second, parts, tmp_path / "features")
    assert second.images == 2
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name])
    third = counted(extractor)
    take(third, parts, tmp_path / "features")
    assert third.images == 0
    assert not list((tmp_path / "features").glob(".*")), "temporary files"


def test_what_changes_is_taken_anew(extractor: EncoderExtractor, parts: list[ImagePart], tmp_path: Path) -> None:
    take(extractor, parts, tmp_path)
    other = [*parts[:-1], ImagePart(tiny_image(20, 24, offset=40), "image 9")]
    again = counted(extractor)
    take(again, other, tmp_path)
    assert again.images == 10
    with torch.no_grad():
        next(extractor.encoder.model.parameters()).add_(1e-3)
    changed = counted(extractor)
    take(changed, parts, tmp_path)
    assert changed.images == 10
    larger = Counted(extractor.encoder, probe_rule(extractor.encoder, 24, "squash"))
    take(larger, parts, tmp_path)
    assert larger.images == 10


def test_a_broken_cache_file(extractor: EncoderExtractor, parts: list[ImagePart], tmp_path: Path) -> None:
    take(extractor, parts, tmp_path / "features")
    path = next((tmp_path / "features").iterdir())
    path.write_bytes(b"cut")
    with pytest.raises(UnclippedError, match=rf"{path}: cached features cannot be read .* delete the file"):
        take(extractor, parts, tmp_path / "features")


def test_a_flipped_bit_in_a_cache_file_is_refused(
    extractor: EncoderExtractor, parts: list[ImagePart], tmp_path: Path
) -> None:
    take(extractor, parts, tmp_path / "features")
    path = next((tmp_path / "features").iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnclippedError, match="not what was written; delete the file"):
        take(extractor, parts, tmp_path / "features")


def test_unreadable_images_are_named(extractor: EncoderExtractor, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png: not an image"):
        take(extractor, [ImagePart(str(broken))], tmp_path / "features")
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        take(extractor, [ImagePart(str(tmp_path / "gone.png"))], tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_random_weights(extractor: EncoderExtractor) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, three = (random_weights(extractor.encoder, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    trained, first, second, third = (encoder.state_dict() for encoder in (extractor.encoder, one, two, three))
    assert list(first) == list(trained)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert any(not torch.equal(first[name], trained[name]) for name in first)
    assert one.spec == extractor.encoder.spec


def test_sizes_that_do_not_fit(extractor: EncoderExtractor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"image_size: 20x20 px is no multiple of the patch of 8x8 px"):
        probe_rule(extractor.encoder, 20, "squash")
    tiny_lm(tmp_path / "lm")
    native, _ = load_encoder(f"llm:{tmp_path / 'lm'}")
    with pytest.raises(UsageError, match=r"image_size: the encoder \(unclipped_llm_encoder\) takes images of any size"):
        probe_rule(native, None, "squash")
