"""The order of samples: a pure function of seed, stage and step, the same for any number of processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_support import RandomTokens

from unclipped.core.errors import UsageError
from unclipped.training.batches import StageBatches, StageLoader
from unclipped.training.config import StageConfig


def batches(size: int = 8, accumulation: int = 1, *, steps: int = 12, **options: int) -> StageBatches:
    stage = StageConfig(train={"text": 1e-3}, steps=steps, batch_size=size, gradient_accumulation=accumulation)
    return StageBatches(RandomTokens(), stage, seed=options.pop("seed", 3), **options)


@settings(max_examples=30, deadline=None)
@given(world=st.sampled_from([1, 2, 4]), accumulation=st.sampled_from([1, 2, 3]), grouping=st.sampled_from([0, 4]))
def test_processes_and_micro_batches_part_the_same_global_batch(world: int, accumulation: int, grouping: int) -> None:
    size = 12 * accumulation
    whole = batches(size, length_grouping=grouping)
    parts = [batches(size, accumulation, world_size=world, rank=r, length_grouping=grouping) for r in range(world)]
    for step in range(6):
        shares = [part.indices(step * accumulation + m) for m in range(accumulation) for part in parts]
        assert [index for share in shares for index in share] == whole.global_indices(step)
        assert len({len(share) for share in shares}) == 1


def test_order_without_grouping_is_the_order_of_the_mixture() -> None:
    assert batches().global_indices(2) == list(range(16, 24))


def test_grouping_keeps_windows_whole_and_batches_alike() -> None:
    grouped = batches(length_grouping=6)
    window = [grouped.global_indices(step) for step in range(6, 12)]
    assert sorted(index for batch in window for index in batch) == list(range(48, 96))
    spans = []
    for batch in window:
        lengths = RandomTokens().lengths(batch)
        spans.append((min(lengths), max(lengths)))
    ordered = sorted(spans)
    assert all(a[1] <= b[0] for a, b in pairwise(ordered))
    assert spans != ordered  # batches are shuffled inside the window
    assert batches(length_grouping=6).global_indices(7) == window[1]
    assert batches(length_grouping=6, seed=4).global_indices(7) != window[1]


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size 6 does not divide into 2 process\(es\) × .* multiple of 4"):
        batches(6, 2, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_starts_where_the_run_stands(workers: int) -> None:
    loaded = batches(steps=4, accumulation=2)
    ids = [b["sample_ids"] for b in StageLoader(loaded, lambda: 2, workers=workers, pin_memory=False)]
    assert ids == [[f"sample-{i}" for i in range(start, start + 4)] for start in (16, 20, 24, 28)]


def test_batches_can_be_sent_to_workers() -> None:
    grouped = batches(length_grouping=3)
    first = grouped.global_indices(1)
    assert pickle.loads(pickle.dumps(grouped)).global_indices(1) == first


class ProcessNumbers(RandomTokens):
    """Examples that tell which process made them."""

    def batch(self, indices: Any) -> dict[str, Any]:
        return super().batch(indices) | {"sample_ids": [str(os.getpid())]}


def test_workers_end_for_their_main_process_alone() -> None:
    """A scheduler or a terminal signals every process; the main one still needs its workers to save."""
    stage = StageConfig(train={"text": 1e-3}, steps=12, batch_size=2)
    loaded = iter(StageLoader(StageBatches(ProcessNumbers(), stage, seed=0), lambda: 0, workers=1, pin_memory=False))
    worker = int(next(loaded)["sample_ids"][0])
    assert worker != os.getpid()
    for name in ("TERM", "HUP", "INT"):
        subprocess.run(["bash", "-c", f"kill -{name} {worker}"], check=True)
    rest = [int(batch["sample_ids"][0]) for batch in loaded]
    assert rest == [worker] * 11
    del loaded


MAIN = """
import sys, time
sys.path[:0] = sys.argv[1:]
from test_training_batches import ProcessNumbers
from unclipped.training.batches import StageBatches, StageLoader
from unclipped.training.config import StageConfig
stage = StageConfig(train={"text": 1e-3}, steps=1000, batch_size=2)
loaded = iter(StageLoader(StageBatches(ProcessNumbers(), stage, seed=0), lambda: 0, workers=1, pin_memory=False))
print(next(loaded)["sample_ids"][0], flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_when_their_main_process_is_killed() -> None:
    here = Path(__file__).parent
    main = subprocess.Popen([sys.executable, "-c", MAIN, here, here.parent], stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    worker = int(main.stdout.readline())
    main.send_signal(signal.SIGKILL)
    main.communicate()
    for _ in range(200):
        status = Path(f"/proc/{worker}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")
