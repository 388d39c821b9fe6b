"""A vision transformer under patterns and dense, one image of many patches, in one model and one process.

The encoder has the shape of DINOv2-small with random weights; --layers cuts it. Sides run in turns, the side that goes
first changes. Reported for each pattern: seconds of both, the median ratio with the smallest and largest, the density
of the plans (attended pairs over all pairs), attention's share of the dense forward (by its own time) and the bound
that this share sets: 1 / (1 − share) were attention free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config

from unclipped.encoders.base import VisionEncoder
from unclipped.encoders.build import build_encoder

EXAMPLES = """examples:
  python benchmarks/sparse_encoder.py --side 64 96 --layers 4 --threads 1
  python benchmarks/sparse_encoder.py --side 64 --pattern "window2d(4, 64)" --dtype bf16
"""
PATTERNS = ("window2d(4, 4)", "tiles(16, 16)", "window2d(4, 4) + grid(16, axis=row)", "window2d(4, 4) + topk(4)")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(arguments: argparse.Namespace) -> VisionEncoder:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=arguments.layers, num_attention_heads=6, image_size=518, patch_size=14
    )
    return build_encoder(config).to(arguments.device, DTYPES[arguments.dtype]).eval()


def synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@torch.no_grad()
def forward_seconds(encoder: VisionEncoder, pixels: Tensor, grid: Tensor) -> float:
    synchronise(pixels)
    start = time.perf_counter()
    encoder(pixels, grid)
    synchronise(pixels)
    return time.perf_counter() - start


def attention_seconds(tokens: int, arguments: argparse.Namespace) -> float:
    """Dense attention of all layers alone, median of three."""
    states = [torch.randn(1, 6, tokens, 64, device=arguments.device, dtype=DTYPES[arguments.dtype]) for _ in range(3)]
    times = []
    for _ in range(4):
        synchronise(states[0])
        start = time.perf_counter()
        F.scaled_dot_product_attention(*states)
        synchronise(states[0])
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * arguments.layers


def measure(encoder: VisionEncoder, side: int, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(side * side, encoder.spec.patch_values, generator=generator).to(arguments.device)
    pixels, grid = pixels.to(DTYPES[arguments.dtype]), torch.tensor([[1, side, side]])
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    density = 1.0
    for repeat in range(-1, arguments.repeats):  # the first warms up
        for name in ("sparse", "dense") if repeat % 2 else ("dense", "sparse"):
            encoder.set_pattern(text if name == "sparse" else None)
            elapsed = forward_seconds(encoder, pixels, grid)
            if repeat >= 0:
                times[name].append(elapsed)
            if encoder.pattern is not None:
                density = statistics.mean(encoder.pattern.density.values())
    encoder.set_pattern(None)
    ratios = [dense / own for own, dense in zip(times["sparse"], times["dense"], strict=True)]
    dense_seconds = statistics.median(times["dense"])
    share = attention_seconds(side * side + 1, arguments) / dense_seconds
    return {
        "pattern": text, "patches": side * side, "sparse_seconds": statistics.median(times["sparse"]),
        "dense_seconds": dense_seconds, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
        "density": density, "attention_share": share, "bound": 1 / max(1e-9, 1 - share),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, nargs="+", default=[64], help="patches of a side of the square image")
    parser.add_argument("--pattern", action="append", help=f"may be given again; default: {', '.join(PATTERNS)}")
    parser.add_argument("--layers", type=int, default=4, help="of 12")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write figures and settings here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    encoder, rows = build(arguments), []
    for side in arguments.side:
        for text in arguments.pattern or PATTERNS:
            row = measure(encoder, side, text, arguments)
            rows.append(row)
            print(
                f"{side * side:6d} {text:36s} density {row['density']:.3f}  dense {row['dense_seconds']:.2f} s  sparse "
                f"{row['sparse_seconds']:.2f} s  ratio {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]; "
                f"attention's share {row['attention_share']:.0%}: at most {row['bound']:.2f}",
                flush=True,
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
