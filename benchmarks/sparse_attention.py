"""Attention alone under block plans, against torch's causal attention on the same threads.

Both sides run in one process, in turns; the side that goes first changes. Reported for each pattern and length: the
median of the ratios of times with the smallest and largest, the density of the plan (attended pairs over causal pairs)
and the efficiency, speed-up × density, which is 1 where skipping costs nothing. Choosing blocks and building the plan
are timed apart. With --pattern and several lengths the growth of time and of extra memory is printed at the end.
"""

from __future__ import annotations

import argparse
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

EXAMPLES = """examples:
  python benchmarks/sparse_attention.py --dtype fp32 --length 8192 --threads 2
  python benchmarks/sparse_attention.py --pattern "topk(8)" --pattern "sink(128) + window(1024)" --length 8192 32768
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def patterns_for(length: int) -> list[str]:
    """A window, the same with sinks, and a top-k choice, of density at most 0.15."""
    tokens = length // 2048 * 128
    return [f"window({tokens})", f"sink(128) + window({tokens - 128})", f"topk({tokens // 128 - 1})"]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def extra_memory(run: Callable[[], object]) -> int:
    """Bytes that a call rises above what was resident before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def measure(text: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    heads, key_heads, width = arguments.heads, arguments.key_heads, arguments.width

    def fresh(count: int) -> Tensor:
        return torch.randn(1, count, length, width, generator=generator).to(DTYPES[arguments.dtype])

    query, key, value = fresh(heads), fresh(key_heads), fresh(key_heads)
    layout = Layout.from_token_types([1] * length, [(1, length // 64, 64)])
    pattern, scale = parse_pattern(text), width**-0.5
    blocks = {"key_block": arguments.key_block, "query_block": arguments.query_block}

    def plan_now() -> BlockPlan:
        return build_plan(pattern, layout, **blocks, query=query[0], key=key[0])

    def sparse() -> Tensor:
        return sparse_attention(query, key, value, plan, scale=scale)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    with torch.no_grad():
        plan = plan_now()
        sparse()
        planning, own, theirs = [], [], []
        for repeat in range(arguments.repeats):
            for side in ("own", "theirs") if repeat % 2 == 0 else ("theirs", "own"):
                if side == "own":
                    own.append(seconds(sparse))
                else:
                    theirs.append(math.nan if arguments.sparse_only else seconds(dense))
            planning.append(seconds(plan_now))
        memory = extra_memory(sparse)
    ratios = [b / a for a, b in zip(own, theirs, strict=True)]
    speedup = statistics.median(ratios)
    return {
        "pattern": text, "length": length, "density": plan.density, "speedup": speedup, "low": min(ratios),
        "high": max(ratios), "efficiency": speedup * plan.density, "sparse_seconds": statistics.median(own),
        "dense_seconds": statistics.median(theirs), "plan_seconds": statistics.median(planning),
        "extra_bytes": memory,
    }  # fmt: skip


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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sparse-only", action="store_true", help="leave dense attention out: growth of long rows")
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
                f"{row['high']:.2f}]  efficiency {row['efficiency']:.2f}  plan {row['plan_seconds'] * 1e3:.1f} ms  "
                f"extra {row['extra_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
    if arguments.pattern and len(arguments.length) > 1:
        for text in arguments.pattern:
            mine = [row for row in rows if row["pattern"] == text]
            time_growth = mine[-1]["sparse_seconds"] / mine[0]["sparse_seconds"]
            memory_growth = mine[-1]["extra_bytes"] / max(1, mine[0]["extra_bytes"])
            lengths = f"{mine[0]['length']} to {mine[-1]['length']}"
            print(f"{text}: {lengths} tokens, time × {time_growth:.2f}, extra memory × {memory_growth:.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
