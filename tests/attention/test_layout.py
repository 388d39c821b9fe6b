from __future__ import annotations

import numpy as np
import pytest
import torch

from unclipped.attention.layout import Layout, Segment
from unclipped.core.errors import UsageError


def test_segments_places_and_images() -> None:
    layout = Layout.from_token_types([0, 1, 1, 1, 1, 1, 1, 0, 1, 1], [(1, 2, 3), (2, 1, 1)])
    assert layout.length == 10
    assert layout.image.tolist() == [-1, 0, 0, 0, 0, 0, 0, -1, 1, 1]
    assert layout.places[1].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]  # rows
    assert layout.places[2].tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 0, 0]  # columns
    assert layout.places[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]  # frames


def test_images_that_follow_each_other_are_parted_by_their_grids() -> None:
    layout = Layout.from_token_types([1] * 5, [(1, 1, 2), (1, 3, 1)])
    assert [segment.length for segment in layout.segments] == [2, 3]


def test_equal_layouts_are_equal_values() -> None:
    ids = torch.tensor([7, 9, 9, 9, 9, 7])
    first, second = (Layout.from_input_ids(ids, 9, [(1, 2, 2)]) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert np.array_equal(first.is_visual, [False, True, True, True, True, False])


@pytest.mark.parametrize(
    ("types", "grids", "message"),
    [
        (
            [0, 1, 1],
            [(1, 2, 2)],
            r"image 0 with grid \(1, 2, 2\).* needs 4 tokens, but 2 visual tokens stand from position 1",
        ),
        ([0, 1, 1], [], "no grid left; 0 grids were given"),
        ([1, 1, 0], [(1, 1, 2), (1, 1, 1)], "1 of 2 grids have no visual tokens"),
        ([1, 1, 0], [(1, 0, 2)], "needs 0 tokens"),
        ([], None, "at least one token"),
    ],
)
def test_bad_input(types: list[int], grids: list[tuple[int, int, int]] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout.from_token_types(types, grids)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "no tokens"),
        ((Segment("text", 1, 3),), "expected a start of 0"),
        ((Segment("text", 0, 0),), "at least one token"),
        ((Segment("visual", 0, 3, 0, (1, 2, 2)),), r"has 3 tokens, but its grid \(1, 2, 2\)"),
    ],
)
def test_bad_segments(segments: tuple[Segment, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout(segments)
