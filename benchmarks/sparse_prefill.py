"""A whole prefill, logits of the last token, under a pattern and dense, in one model and one process.

The decoder has the shape of Qwen3-0.6B with random weights; --layers cuts it. All tokens but 64 of text before and
behind are one image. Sides run in turns, the side that goes first changes. Reported: seconds of both, the median ratio
with the smallest and largest, what the layers did, the attention's share of the dense prefill (by its own time) and
the bound that this share sets: 1 / (1 − share) were attention free. Also what making plans takes of the sparse prefill:
for a static pattern their building, once for all layers, for a dynamic one choosing and building in each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from unclipped.attention.layout import Layout
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.syntax import parse_pattern

EXAMPLES = """examples:
  python benchmarks/sparse_prefill.py --length 16384 --layers 8 --dtype bf16
  python benchmarks/sparse_prefill.py --length 4096 --layers 8 --fallback auto
  python benchmarks/sparse_prefill.py --layers 2 --threads 1 --sparse-only --clock cpu --repeats 3
"""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TEXT = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(arguments: argparse.Namespace) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=arguments.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=2 * max(arguments.length),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(arguments.device, DTYPES[arguments.dtype]).eval()


@torch.no_grad()
def prefill_seconds(model: Qwen3ForCausalLM, ids: Tensor, clock: Callable[[], float]) -> float:
    synchronise(ids)
    start = clock()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    synchronise(ids)
    return clock() - start


def synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def attention_seconds(length: int, arguments: argparse.Namespace) -> float:
    """Dense attention of all layers alone, median of three."""
    shape = (1, 16, length, 128)
    query, key, value = (torch.randn(shape, dtype=DTYPES[arguments.dtype], device=arguments.device) for _ in range(3))
    times, clock = [], CLOCKS[arguments.clock]
    for _ in range(3):
        synchronise(query)
        start = clock()
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
        synchronise(query)
        times.append(clock() - start)
    return statistics.median(times) * arguments.layers


def measure(model: Qwen3ForCausalLM, length: int, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 151_936, (1, length), generator=generator).to(arguments.device)
    columns = 64
    visual = (length - 2 * TEXT) // columns * columns
    types = [0] * TEXT + [1] * visual + [0] * (length - TEXT - visual)
    layout = Layout.from_token_types(types, [(1, visual // columns, columns)])
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    report, clock = [], CLOCKS[arguments.clock]
    plan_seconds, plan_shares = [], []
    for repeat in range(-1, arguments.repeats):
        for side in ("sparse", "dense") if repeat % 2 else ("dense", "sparse"):
            if side == "dense" and arguments.sparse_only:
                continue
            if side == "sparse":
                with sparse_prefill(model, text, fallback=arguments.fallback, layouts=[layout]) as sparse:
                    sparse.state.clock = clock
                    elapsed = prefill_seconds(model, ids, clock)
                    report = sparse.report()
                if repeat >= 0:
                    plan_seconds.append(sum(record.plan_seconds for record in report))
                    plan_shares.append(plan_seconds[-1] / elapsed)
            else:
                elapsed = prefill_seconds(model, ids, clock)
            if repeat >= 0:
                times[side].append(elapsed)
    row = {
        "pattern": text, "length": length, "sparse_seconds": statistics.median(times["sparse"]),
        "mode": report[0].mode, "reason": report[0].reason,
        "density": sum(record.density for record in report) / len(report),
        "plans": "selection" if parse_pattern(text).is_dynamic else "plan building",
        "plan_seconds": statistics.median(plan_seconds), "plan_share": statistics.median(plan_shares),
        "plan_share_most": max(plan_shares),
    }  # fmt: skip
    if arguments.sparse_only:
        return row
    ratios = [dense / own for own, dense in zip(times["sparse"], times["dense"], strict=True)]
    dense_seconds = statistics.median(times["dense"])
    share = attention_seconds(length, arguments) / dense_seconds
    return row | {
        "dense_seconds": dense_seconds, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
        "attention_share": share, "bound": 1 / max(1e-9, 1 - share),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    text = (
        f"{row['length']:6d} {row['pattern']:28s} {row['mode']} {row['reason'] or ''} density {row['density']:.3f}  "
        f"sparse {row['sparse_seconds']:.2f} s; "
    )
    if "ratio" in row:
        text += (
            f"dense {row['dense_seconds']:.2f} s  ratio {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]; "
            f"attention's share {row['attention_share']:.0%}: at most {row['bound']:.2f}; "
        )
    return text + (
        f"{row['plans']} {row['plan_seconds'] * 1e3:.1f} ms, {row['plan_share']:.2%} of the sparse prefill "
        f"(at most {row['plan_share_most']:.2%})"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, nargs="+", default=[16_384], help="tokens")
    parser.add_argument(
        "--pattern", action="append", help="may be given again; default: a window with sinks, and top-k"
    )
    parser.add_argument("--layers", type=int, default=8, help="of 28")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fallback", choices=("auto", "never"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sparse-only", action="store_true", help="leave the dense side out: only the share of plans")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, for busy machines"
    )
    parser.add_argument("--json", metavar="FILE", help="write figures and settings here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model, rows = build(arguments), []
    for length in arguments.length:
        window = length // 2048 * 128 - 128
        for text in arguments.pattern or [f"sink(128) + window({window})", f"topk({length // 2048 - 1})"]:
            row = measure(model, length, text, arguments)
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
