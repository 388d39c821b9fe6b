"""When sparse attention pays on this machine: measured once for a shape of attention, kept in the user's cache.

For a few lengths dense attention and two plans of low and of middle density are timed, planning included; time is taken
as linear in density, and the density at which both are equally fast is kept. Only the choice between dense and sparse
depends on it, never what sparse attention computes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.layout import Layout
from unclipped.attention.patterns import Window
from unclipped.attention.plan import BlockPlan, build_plan
from unclipped.attention.sparse import sparse_attention
from unclipped.core.documents import read_json
from unclipped.core.errors import DataError, UnclippedError
from unclipped.core.files import write_json

logger = logging.getLogger("unclipped.attention")
LENGTHS = (1024, 2048, 4096)
_REPEATS = 3
_GAIN = 1.05  # dense is kept unless sparse is at least so much faster
_FORM = 2  # of the kept file and of the backend that was timed; another one measures again


@dataclass(frozen=True)
class Calibration:
    """Densities up to which sparse attention is the faster, from each length on; below the first length it never is."""

    lengths: tuple[int, ...] = (4096,)
    densities: tuple[float, ...] = (0.5,)
    is_measured: bool = False

    def densest(self, length: int) -> float:
        """The density up to which a prompt of `length` tokens runs sparsely; 0 where none does."""
        known = [density for least, density in zip(self.lengths, self.densities, strict=True) if length >= least]
        return known[-1] if known else 0.0

    def reason_before(self, length: int) -> str | None:
        """Why a prompt runs dense whatever its plan, if it does."""
        if length < self.lengths[0]:
            return f"{length} tokens are fewer than {self.lengths[0]}"
        if self.densest(length) <= 0.0:
            return f"no plan is faster than dense attention at {length} tokens on this machine (measured)"
        return None

    def reason(self, plan: BlockPlan, length: int) -> str | None:
        """Why a plan of a prompt of `length` tokens runs dense, if it does."""
        limit = self.densest(length)
        if plan.density <= limit:
            return None
        measured = ", where dense attention is as fast on this machine (measured)" if self.is_measured else ""
        return f"density {plan.density:.2f} is above {limit:.2f}{measured}"


FIXED = Calibration()
"""The rule without measurement: for training, so that runs do not depend on the machine, and for other devices."""


@dataclass(frozen=True)
class Shape:
    """The attention of a layer, as far as its speed depends on it."""

    heads: int
    key_heads: int
    width: int
    dtype: torch.dtype
    key_block: int
    query_block: int


_KNOWN: dict[tuple[Shape, int], Calibration] = {}


def calibration_for(shape: Shape) -> Calibration:
    """The calibration of this machine's CPU for a shape: from memory, from the cache file, or measured now."""
    threads = torch.get_num_threads()
    if (shape, threads) in _KNOWN:
        return _KNOWN[shape, threads]
    key = {
        **asdict(shape), "dtype": str(shape.dtype), "device": processor_name(), "threads": threads,
        "torch": str(torch.__version__), "form": _FORM,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}.json"
    found = read(path, key)
    if found is None:
        logger.info("sparse prefill: measuring when it pays on this machine (once for this shape, a few seconds)")
        found = measure(shape)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"key": key, "lengths": found.lengths, "densities": found.densities})
        except (OSError, UnclippedError) as error:
            logger.warning("sparse prefill: the measurement is not kept: %s", error)
    _KNOWN[shape, threads] = found
    return found


def cache_folder() -> Path:
    """Where measurements are kept: `unclipped/attention` in $XDG_CACHE_HOME or ~/.cache. Its files may be deleted."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "unclipped" / "attention"


def read(path: Path, key: dict[str, object]) -> Calibration | None:
    """What a cache file says; None when there is none, or, with a warning, when it cannot be used."""
    if not path.is_file():
        return None
    try:
        held = read_json(path)
        lengths, densities = tuple(map(int, held["lengths"])), tuple(map(float, held["densities"]))
        if held["key"] != key or len(lengths) != len(densities) or not lengths:
            raise ValueError("it belongs to another machine or shape")
    except (DataError, ValueError, KeyError, TypeError, OverflowError) as error:
        logger.warning("sparse prefill: %s cannot be used and is measured again: %s", path, error)
        return None
    return Calibration(lengths, densities, is_measured=True)


def processor_name() -> str:
    """The CPU's own name where the system tells it (Linux)."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(shape: Shape, clock: Callable[[], float] = time.perf_counter) -> Calibration:
    """Time dense and sparse attention on at most two key heads: both sides grow alike with more."""
    key_heads = min(2, shape.key_heads)
    heads = shape.heads // shape.key_heads * key_heads
    generator = torch.Generator().manual_seed(0)
    densities = []
    for length in LENGTHS:
        query, key, value = (
            torch.randn(1, count, length, shape.width, generator=generator).to(shape.dtype)
            for count in (heads, key_heads, key_heads)
        )
        densities.append(_break_even(query, key, value, shape, clock))
    return Calibration(LENGTHS, tuple(densities), is_measured=True)


@torch.no_grad()
def _break_even(query: Tensor, key: Tensor, value: Tensor, shape: Shape, clock: Callable[[], float]) -> float:
    length, scale = query.shape[2], query.shape[3] ** -0.5
    layout = Layout.from_token_types([0] * length)
    windows = (Window(length // 16), Window(length // 2))

    def sparse(window: Window) -> float:
        plan = build_plan(window, layout, key_block=shape.key_block, query_block=shape.query_block)
        sparse_attention(query, key, value, plan, scale=scale)
        return plan.density

    def seconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    points = [sparse(window) for window in windows]  # warms up as well
    times: list[list[float]] = []
    for _ in range(_REPEATS):
        dense = seconds(
            lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        )
        times.append([dense, *(seconds(lambda window=window: sparse(window)) for window in windows)])
    dense, low, high = (statistics.median(column) for column in zip(*times, strict=True))
    slope = (high - low) / (points[1] - points[0]) if points[1] > points[0] else 0.0
    wanted = dense / _GAIN
    if slope <= 0.0:  # nothing to tell them apart by
        return 1.0 if max(low, high) <= wanted else 0.0
    return round(min(1.0, max(0.0, points[0] + (wanted - low) / slope)), 3)
