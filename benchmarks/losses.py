"""Time and memory of losses that compare all rows of a batch, at growing batch, whole and in chunks.

InfoNCE and the sigmoid loss compare images with captions, KoLeo features with each other: similarities grow with the
square of the batch where they stand in memory whole. Forward and backward of each, float32, in this process, forms in
turns: seconds of CPU time, medians, with the ratio of the whole form to the chunked one (below 1: the whole is faster).
Memory is the peak of the resident set of one forward and backward in a process of its own, above that process with the
inputs in it; gradients of the inputs are part of it. Sinkhorn has no backward; its inputs are scores of the batch
against prototypes and grow with the batch anyway. The exponent of growth is the slope of a line through logarithms,
over the upper half of the batches.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.core.files import write_json
from unclipped.objectives.dino_losses import koleo_loss, sinkhorn
from unclipped.objectives.pair_losses import info_nce, sigmoid_loss

EXAMPLES = """examples:
  python benchmarks/losses.py
  python benchmarks/losses.py --losses koleo --batches 2048 4096 8192 16384 32768 --most-whole 8192
"""
LOSSES = ("info_nce", "sigmoid", "koleo", "sinkhorn")
FORMS = ("whole", "chunked")
ENOUGH_SECONDS = 10.0
"""No further repeat of a case begins after so long."""


def inputs_of(loss: str, batch: int, arguments: argparse.Namespace) -> list[Tensor]:
    """Unit vectors (batch, width) of one or two sides, or scores (batch, prototypes)."""
    generator = torch.Generator().manual_seed(0)
    if loss == "sinkhorn":
        return [torch.rand(batch, arguments.prototypes, generator=generator)]
    rows = [torch.randn(batch, arguments.width, generator=generator) for _ in range(1 if loss == "koleo" else 2)]
    return [F.normalize(values, dim=1).requires_grad_() for values in rows]


def step(loss: str, inputs: list[Tensor], chunk: int) -> Callable[[], None]:
    """Forward and backward, gradients thrown away; of Sinkhorn the forward."""
    scale, bias = torch.tensor([math.log(10.0)]), torch.tensor([-10.0])

    def run() -> None:
        if loss == "sinkhorn":
            sinkhorn(inputs[0], 0.05)
            return
        if loss == "koleo":
            value = koleo_loss(inputs[0], chunk)
        elif loss == "info_nce":
            value = info_nce(*inputs, scale, chunk=chunk)
        else:
            value = sigmoid_loss(*inputs, scale, bias, chunk=chunk)
        value.backward()
        for values in inputs:
            values.grad = None

    return run


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure_memory(loss: str, form: str, batch: int, arguments: argparse.Namespace) -> int:
    """Bytes of one step above the inputs, in this process."""
    step(loss, inputs_of(loss, 64, arguments), 16)()  # what libraries load and allocate once
    run = step(loss, inputs_of(loss, batch, arguments), arguments.chunk if form == "chunked" else batch)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def memory_apart(loss: str, form: str, batch: int, arguments: argparse.Namespace) -> int:
    """`measure_memory` in a process of its own. Exits with that process's last line when it fails."""
    command = [sys.executable, __file__, "--memory-of", loss, form, str(batch)]
    for name in ("width", "prototypes", "chunk", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    # Freed memory goes back at once, so that it does not count twice.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode} (out of memory?)"]
        sys.exit(f"memory of {loss}, {form}, batch {batch}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_times(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each form, forms in turns, the one that begins changing."""
    for run in steps.values():
        run()
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    begun = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - begun > ENOUGH_SECONDS:
            break
        turns = list(steps.items())
        for form, run in turns if repeat % 2 == 0 else reversed(turns):
            start = time.process_time()
            run()
            seconds[form].append(time.process_time() - start)
    return seconds


def exponent(batches: list[int], values: list[float]) -> float:
    """Slope of log(values) over log(batches), over the upper half of the batches; NaN for a single one."""
    pairs = [(math.log(batch), math.log(value)) for batch, value in zip(batches, values, strict=True) if value > 0]
    pairs = pairs[len(pairs) // 2 :]
    if len(pairs) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope


def measure(loss: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and form, printed as they come, then the exponents."""
    rows: list[dict[str, Any]] = []
    for batch in arguments.batches:
        forms = ["whole"] if loss == "sinkhorn" else [f for f in FORMS if f != "whole" or batch <= arguments.most_whole]
        memory = {form: memory_apart(loss, form, batch, arguments) for form in forms}
        inputs = inputs_of(loss, batch, arguments)
        chunks = {"whole": batch, "chunked": arguments.chunk}
        seconds = measure_times({form: step(loss, inputs, chunks[form]) for form in forms}, arguments.repeats)
        for form in forms:
            times = seconds[form]
            row = {"loss": loss, "form": form, "batch": batch, "bytes": memory[form], "repeats": len(times)}
            rows.append(row | {"seconds": statistics.median(times), "low": min(times), "high": max(times)})
            spread = f"{statistics.median(times):9.4f} s [{min(times):.4f}, {max(times):.4f}]"
            print(f"{loss:<9}{form:<8}{batch:>7} {spread} {memory[form] / 2**20:9.1f} MiB", flush=True)
        if len(forms) == 2:
            ratios = [whole / chunked for whole, chunked in zip(seconds["whole"], seconds["chunked"], strict=True)]
            spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            print(f"{loss:<9}{'':8}{batch:>7} whole / chunked {spread}", flush=True)
    for form in FORMS:
        own = [row for row in rows if row["form"] == form]
        if own:
            batches = [row["batch"] for row in own]
            grown = {key: exponent(batches, [row[key] for row in own]) for key in ("seconds", "bytes")}
            print(
                f"{loss:<9}{form:<8} time ~ batch^{grown['seconds']:.2f}, memory ~ batch^{grown['bytes']:.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--most-whole", type=int, default=8192, help="largest batch of the whole form (default 8192)")
    parser.add_argument("--width", type=int, default=256, help="of features (default 256)")
    parser.add_argument("--prototypes", type=int, default=4096, help="of Sinkhorn (default 4096)")
    parser.add_argument("--chunk", type=int, default=1024, help="rows at a time (default 1024)")
    parser.add_argument("--repeats", type=int, default=5, help=f"at most; none begins after {ENOUGH_SECONDS:.0f} s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the figures and the settings here")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if min(given.batches) < 2 or min(given.width, given.prototypes, given.chunk, given.repeats, given.threads) < 1:
        parser.error("expected batches of 2 or more and sizes of 1 or more")
    if not Path("/proc/self/clear_refs").exists():
        parser.error("memory is read from /proc, which is Linux only")
    torch.set_num_threads(given.threads)
    if given.memory_of:
        loss, form, batch = given.memory_of
        print(json.dumps(measure_memory(loss, form, int(batch), given)))
        return
    given.batches = sorted(given.batches)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {given.threads} thread(s), float32, width {given.width}, "
        f"{given.prototypes} prototypes, chunks of {given.chunk} rows"
    )
    rows = [row for loss in given.losses for row in measure(loss, given)]
    if given.json:
        settings = {name: value for name, value in vars(given).items() if name not in ("json", "memory_of")}
        write_json(given.json, {"torch": torch.__version__, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
