"""Attention alone under block plans, against torch's causal attention on the same threads.

Both sides run in one process, in turns; the side that goes first changes. Reported for each pattern and length: the
median of the ratios of times with the smallest and largest, the density of the plan (attended pairs over causal pairs)
and the efficiency, speed-up × density, which is 1 where skipping costs nothing. Choosing blocks and building the plan
are timed apart. Memory is measured when all times are taken (Linux): the growth of the process's resident memory at its
peak, beyond the inputs and the output, also with the output, and that of choosing and planning. With --pattern and
several lengths the growth of time and memory from the first to the last is printed at the end. With --layer-window
both sides run a layer with a sliding window: the plan inside it, and dense attention behind its mask, which is built
beforehand.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.attention.layout import Layout
from unclipped.attention.plan import BlockPlan, build_plan
from unclipped.attention.sparse import sparse_attention
from unclipped.attention.syntax import parse_pattern
from unclipped.evaluation.sparse.memory import peak_bytes

EXAMPLES = """examples:
  python benchmarks/sparse_attention.py --dtype fp32 --length 8192 --threads 2
  python benchmarks/sparse_attention.py --pattern "topk(8)" --pattern "sink(128) + window(1024)" --length 8192 32768
  python benchmarks/sparse_attention.py --pattern full --length 8192 --layer-window 1024
  python benchmarks/sparse_attention.py --pattern "topk(3)" --length 8192 32768 --sparse-only --clock cpu --threads 1
"""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def patterns_for(length: int) -> list[str]:
    """A window, the same with sinks, and a top-k choice, of density at most 0.15."""
    tokens = length // 2048 * 128
    return [f"window({tokens})", f"sink(128) + window({tokens - 128})", f"topk({tokens // 128 - 1})"]


class Case:
    """Random states of one length and a pattern."""

    def __init__(self, text: str, length: int, arguments: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = (arguments.heads, arguments.key_heads, arguments.key_heads)
        self.query, self.key, self.value = (
            torch.randn(1, count, length, arguments.width, generator=generator).to(DTYPES[arguments.dtype])
            for count in counts
        )
        self.layout = Layout.from_token_types([1] * length, [(1, length // 64, 64)])
        self.mask: Tensor | None = None
        if arguments.layer_window:
            self.layout = self.layout.with_sight("causal", arguments.layer_window)
            self.mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - arguments.layer_window)
        self.pattern, self.scale = parse_pattern(text), arguments.width**-0.5
        self.blocks = {"key_block": arguments.key_block, "query_block": arguments.query_block}

    def plan(self) -> BlockPlan:
        return build_plan(self.pattern, self.layout, **self.blocks, query=self.query[0], key=self.key[0])

    def sparse(self, plan: BlockPlan) -> Tensor:
        return sparse_attention(self.query, self.key, self.value, plan, scale=self.scale)

    def dense(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=self.mask, is_causal=self.mask is None, scale=self.scale,
            enable_gqa=True,
        )  # fmt: skip


def return_freed_memory() -> None:
    """Have the C library give freed memory back at once, else what earlier calls freed is used again unseen."""
    mmap_threshold, trim_threshold = -3, -1  # as in malloc.h
    library = ctypes.CDLL(None)
    library.mallopt(mmap_threshold, 1 << 16)
    library.mallopt(trim_threshold, 0)


@torch.no_grad()
def measure_memory(text: str, length: int, arguments: argparse.Namespace) -> dict[str, int | None]:
    """Peak bytes beyond the inputs: of attention with and without its output, and of choosing and planning."""
    case, cpu = Case(text, length, arguments), torch.device("cpu")
    plan = case.plan()
    output = case.query.numel() * case.query.element_size()
    peak = peak_bytes(lambda: case.sparse(plan), cpu)
    return {
        "extra_bytes": None if peak is None else peak - output,
        "extra_bytes_with_output": peak,
        "plan_bytes": peak_bytes(case.plan, cpu),
    }


def measure(text: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    case, clock = Case(text, length, arguments), CLOCKS[arguments.clock]

    def seconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    with torch.no_grad():
        plan = case.plan()
        case.sparse(plan)
        planning, own, theirs = [], [], []
        for repeat in range(arguments.repeats):
            for side in ("own", "theirs") if repeat % 2 == 0 else ("theirs", "own"):
                if side == "own":
                    own.append(seconds(lambda: case.sparse(plan)))
                else:
                    theirs.append(math.nan if arguments.sparse_only else seconds(case.dense))
            planning.append(seconds(case.plan))
    ratios = [b / a for a, b in zip(own, theirs, strict=True)]
    speedup = statistics.median(ratios)
    return {
        "pattern": text, "length": length, "density": plan.density, "speedup": speedup, "low": min(ratios),
        "high": max(ratios), "efficiency": speedup * plan.density, "sparse_seconds": statistics.median(own),
        "dense_seconds": statistics.median(theirs), "plan_seconds": statistics.median(planning),
    }  # fmt: skip


def mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.1f}"


def growth(rows: list[dict[str, Any]], field: str) -> str:
    """The last over the first."""
    first, last = rows[0][field], rows[-1][field]
    return f"× {last / first:.2f}" if first and last else "–"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 16384], help="tokens")
    parser.add_argument(
        "--pattern", action="append", help="a pattern; may be given again; default: three of low density"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--key-block", type=int, default=128)
    parser.add_argument("--query-block", type=int, default=256)
    parser.add_argument("--layer-window", type=int, default=0, help="sliding window of the layer, in tokens; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sparse-only", action="store_true", help="leave dense attention out: growth of long rows")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, for busy machines"
    )
    parser.add_argument("--json", metavar="FILE", help="write figures and settings here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    rows = []
    for length in arguments.length:
        for text in arguments.pattern or patterns_for(length):
            row = measure(text, length, arguments)
            rows.append(row)
            print(
                f"{length:6d} {text:32s} density {row['density']:.3f}  {row['dense_seconds'] * 1e3:8.1f} ms dense  "
                f"{row['sparse_seconds'] * 1e3:7.1f} ms sparse  speed-up {row['speedup']:.2f} [{row['low']:.2f}, "
                f"{row['high']:.2f}]  efficiency {row['efficiency']:.2f}  plan {row['plan_seconds'] * 1e3:.1f} ms",
                flush=True,
            )
    return_freed_memory()
    for row in rows:
        row |= measure_memory(row["pattern"], row["length"], arguments)
        beyond, whole, plan = (
            mebibytes(row[field]) for field in ("extra_bytes", "extra_bytes_with_output", "plan_bytes")
        )
        print(
            f"{row['length']:6d} {row['pattern']:32s} MiB beyond inputs and output {beyond}, with output {whole}, "
            f"choosing and planning {plan}",
            flush=True,
        )
    if arguments.pattern and len(arguments.length) > 1:
        for text in arguments.pattern:
            mine = [row for row in rows if row["pattern"] == text]
            print(
                f"{text}: {mine[0]['length']} to {mine[-1]['length']} tokens, time {growth(mine, 'sparse_seconds')}, "
                f"memory beyond inputs and output {growth(mine, 'extra_bytes')}, with output "
                f"{growth(mine, 'extra_bytes_with_output')}"
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
