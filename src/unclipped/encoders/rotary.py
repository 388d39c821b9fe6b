"""Two-dimensional rotary positions made of a language model's own one-dimensional tables.

Both forms evaluate the decoder's rotary module at the row and at the column of a patch and mix the two, so the
frequencies, the scaling and the half-split layout (dimension i turns with i + d/2) stay those that the weights know.
Both equal the decoder's 1-D positions where row = column.

- `axial`: each rotating pair (i, i + d/2) turns by one angle; even i take the row, odd i the column. It is a true
  rotation: norms are kept and scores depend on the differences of rows and of columns only.
- `penguin`: the first half of the dimensions takes cos and sin of the row, the second half those of the column, while
  dimension i is still mixed with i + d/2. Off the diagonal this is no rotation: norms change and scores are not purely
  relative. It is kept because published Penguin-VL encoders were trained with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from unclipped.core.errors import UsageError

RopeForm = Literal["penguin", "axial"]
ROPE_FORMS: tuple[str, ...] = ("penguin", "axial")
CosSin = tuple[Tensor, Tensor]


def grid_positions(grids: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch in row-major order: two int64 tensors (B, n), or (1, n) when all grids are equal."""
    distinct = list(dict.fromkeys(grids))
    chosen = distinct if len(distinct) == 1 else list(grids)
    indices = [torch.arange(h * w, device=device) for h, w in chosen]
    rows = torch.stack([index // w for index, (_, w) in zip(indices, chosen, strict=True)])
    columns = torch.stack([index % w for index, (_, w) in zip(indices, chosen, strict=True)])
    return rows, columns


def two_axis_tables(rotary: Callable[..., CosSin], x: Tensor, rows: Tensor, columns: Tensor, form: RopeForm) -> CosSin:
    """cos and sin, each (B, n, d), for patches at (row, column); `rotary(x, positions)` is the decoder's module."""
    cos_row, sin_row = rotary(x, rows)
    cos_column, sin_column = rotary(x, columns)
    mix = penguin if form == "penguin" else axial
    return mix(cos_row, cos_column), mix(sin_row, sin_column)


def penguin(row: Tensor, column: Tensor) -> Tensor:
    """First half of the dimensions from the row, second half from the column. (…, d) each."""
    half = row.shape[-1] // 2
    return torch.cat((row[..., :half], column[..., half:]), dim=-1)


def axial(row: Tensor, column: Tensor) -> Tensor:
    """Frequencies of even number from the row, of odd number from the column. (…, d) each."""
    half = row.shape[-1] // 2
    takes_row = torch.arange(half, device=row.device) % 2 == 0  # (d/2,)
    return torch.where(takes_row.repeat(2), row, column)


def check_half_split(rotary: Callable[..., Any], hidden_size: int, name: str) -> None:
    """Raise UsageError unless `rotary` gives (cos, sin) whose two halves repeat each other (the half-split layout)."""
    tables = rotary(torch.zeros(1, 2, hidden_size), torch.tensor([[1, 7]]))
    found = "complex tables" if isinstance(tables, Tensor) else "an interleaved layout"
    if isinstance(tables, tuple) and len(tables) == 2 and not tables[0].is_complex():
        half = tables[0].shape[-1] // 2
        if all(torch.equal(table[..., :half], table[..., half:]) for table in tables):
            return
    raise UsageError(
        f"{name}: two-dimensional positions need the half-split rotary layout (dimension i paired with i + d/2), "
        f"found {found}; choose a decoder of the Qwen, Llama, SmolLM, Gemma or Mistral kind"
    )
