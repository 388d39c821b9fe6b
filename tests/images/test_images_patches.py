"""Patches: the round trip is exact, and the order is row-major with channel, row, column inside a patch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.core.errors import ImageError
from unclipped.images.patches import patchify, unpatchify

small = st.integers(1, 5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small, small, small, small, st.sampled_from([1, 3, 4]), st.integers(0, 3), st.booleans())
def test_round_trip_is_exact(h: int, w: int, ph: int, pw: int, channels: int, batch: int, bytes_: bool) -> None:
    shape = (batch, channels, h * ph, w * pw) if batch else (channels, h * ph, w * pw)
    planes = torch.randint(0, 256, shape).to(torch.uint8 if bytes_ else torch.float32)
    patches = patchify(planes, (ph, pw))
    assert patches.shape == (*shape[:-3], h * w, channels * ph * pw)
    assert torch.equal(unpatchify(patches, (h, w), (ph, pw), channels), planes)
    if batch:
        assert torch.equal(patches[0], patchify(planes[0], (ph, pw)))


def test_order_by_hand() -> None:
    planes = torch.arange(2 * 4 * 6).reshape(2, 4, 6)  # value = channel*24 + row*6 + column
    patches = patchify(planes, (2, 3))
    assert patches[0].tolist() == [0, 1, 2, 6, 7, 8, 24, 25, 26, 30, 31, 32]
    assert patches[1].tolist() == [3, 4, 5, 9, 10, 11, 27, 28, 29, 33, 34, 35]  # the next patch of the same row
    assert patches[2, 0] == 12


def test_a_convolution_over_planes_is_a_product_with_patches() -> None:
    planes = torch.randn(2, 3, 32, 48)
    convolution = torch.nn.Conv2d(3, 5, (16, 8), stride=(16, 8))
    expected = convolution(planes).flatten(2).transpose(1, 2)  # (B, h*w, 5)
    product = patchify(planes, (16, 8)) @ convolution.weight.flatten(1).T + convolution.bias
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ImageError, match="30x32 px cannot be cut into 16x16"):
        patchify(torch.zeros(3, 30, 32), (16, 16))
    with pytest.raises(ImageError, match="expected planes"):
        patchify(torch.zeros(30, 32), (16, 16))
    with pytest.raises(ImageError, match="2x3 grid"):
        unpatchify(torch.zeros(5, 768), (2, 3), (16, 16))
    with pytest.raises(ImageError, match="unpatchify"):
        unpatchify(torch.zeros(6, 700), (2, 3), (16, 16))
