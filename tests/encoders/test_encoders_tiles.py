"""Images encoded in tiles: every family against its own features of the tiles cut out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoder_factories import ALL
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoders_contract import build, images_for

from unclipped.core.errors import UsageError
from unclipped.encoders.tiling import tiled
from unclipped.images.patches import patchify

TILE = (2, 3)


@pytest.mark.parametrize("name", sorted(ALL))
@torch.no_grad()
def test_a_tile_is_seen_as_an_image_of_its_own(name: str) -> None:
    """Two pages, of whole tiles and of ragged ones: features at a place are those of its tile, cut from the pixels."""
    encoder = build(name)
    grids = [(4, 6), (3, 4)]
    planes, pixels, thw = images_for(encoder, grids)
    encoder.set_tile(TILE)
    found = encoder(pixels, thw)
    encoder.set_tile(None)
    height, width = encoder.spec.patch_size
    start = 0
    for plane, (rows, columns) in zip(planes, grids, strict=True):
        page = found[start : start + rows * columns].reshape(rows, columns, -1)
        for top in range(0, rows, TILE[0]):
            for left in range(0, columns, TILE[1]):
                cut = plane[:, top * height : (top + TILE[0]) * height, left * width : (left + TILE[1]) * width]
                grid = (cut.shape[1] // height, cut.shape[2] // width)
                alone = encoder(patchify(cut, encoder.spec.patch_size), torch.tensor([[1, *grid]]))
                here = page[top : top + grid[0], left : left + grid[1]].flatten(0, 1)
                torch.testing.assert_close(here, alone, atol=1e-5, rtol=0)
        start += rows * columns


@pytest.mark.parametrize("name", ["vit", "unclipped_llm_encoder"])
def test_a_tile_as_large_as_the_image_changes_nothing(name: str) -> None:
    encoder = build(name)
    _, pixels, thw = images_for(encoder, [(4, 4), (2, 3)])
    with torch.no_grad():
        whole = encoder(pixels, thw)
        encoder.set_tile(4)
        assert torch.equal(encoder(pixels, thw), whole)


@settings(max_examples=50, deadline=None)
@given(
    frames=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_the_order_is_a_permutation_into_tiles(frames: list[tuple[int, int]], tile: tuple[int, int]) -> None:
    order, back, grids = tiled(tuple(frames), tile)
    assert order[back].tolist() == list(range(len(order)))
    assert sorted(order.tolist()) == list(range(sum(rows * columns for rows, columns in frames)))
    assert all(rows <= tile[0] and columns <= tile[1] for rows, columns in grids)
    assert sum(rows * columns for rows, columns in grids) == len(order)


def test_gradients_reach_every_patch_once() -> None:
    encoder = build("vit")
    _, pixels, thw = images_for(encoder, [(5, 4)])
    encoder.set_tile(2)
    with torch.inference_mode():  # an evaluation before must not leave tensors behind that cannot train
        encoder(pixels, thw)
    pixels.requires_grad_()
    encoder(pixels, thw)[7, 0].backward()  # row 1, column 3: the tile of rows 0 and 1, columns 2 and 3
    assert pixels.grad is not None
    assert pixels.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [2, 3, 6, 7]


def test_tiles_are_part_of_the_model(tmp_path: Path) -> None:
    from support.tiny_models import tiny_vlm
    from unclipped.models.checkpoint import load_model

    model, _, _ = tiny_vlm(tmp_path, "llm", output=tmp_path / "model", vision_tile=(2, 2))
    tower = model.model.vision_tower
    _, pixels, thw = images_for(tower, [(4, 6)])
    loaded, _ = load_model(str(tmp_path / "model"))
    assert loaded.config.vision_tile == [2, 2]
    with torch.no_grad():
        features = tower(pixels, thw)
        assert torch.allclose(loaded.model.vision_tower(pixels, thw), features, atol=1e-5)
        tower.set_tile(None)
        assert not torch.allclose(tower(pixels, thw), features, atol=1e-3)


@pytest.mark.parametrize("tile", [0, (0, 2), (2, -1), (1, 2, 3)])
def test_bad_tiles(tile: int | tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"tile: expected rows and columns of patches, both at least 1"):
        build("vit").set_tile(tile)
