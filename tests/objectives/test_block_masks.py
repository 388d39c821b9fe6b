"""Block masks: exact counts, blocks, determinism."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.objectives.block_masks import block_mask


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 1000))
def test_exactly_the_asked_number_is_masked(rows: int, columns: int, share: float, seed: int) -> None:
    count = round(share * rows * columns)
    mask = block_mask((rows, columns), count, np.random.default_rng(seed))
    assert mask.shape == (rows, columns)
    assert mask.dtype == bool
    assert mask.sum() == count
    assert np.array_equal(mask, block_mask((rows, columns), count, np.random.default_rng(seed)))


def test_masks_are_blocks_and_not_scattered_patches() -> None:
    def neighbours(mask: np.ndarray) -> float:
        pairs = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
        return pairs / mask.sum()

    blocks = np.mean([neighbours(block_mask((16, 16), 64, np.random.default_rng(i))) for i in range(50)])
    scattered = np.mean([neighbours(np.random.default_rng(i).permutation(256).reshape(16, 16) < 64) for i in range(50)])
    assert blocks > 2 * scattered
