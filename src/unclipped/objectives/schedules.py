"""Values that change with the step."""

from __future__ import annotations

import math


def linear(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps`, then constant."""
    share = 1.0 if steps == 0 else min(1.0, step / steps)
    return start + (end - start) * share


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps` on half a cosine, then constant."""
    share = 1.0 if steps == 0 else min(1.0, step / steps)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))
