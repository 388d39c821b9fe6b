"""A training step on rows of different length: padding left to causality, against an attention mask for it.

Rows are padded behind their last token, so that no token sees padding anyway. Without the mask torch's attention forms
the causal half of all pairs; with it all of them, and the mask is read, too. One model with random weights, shaped like
the readers of pages (encoder and language model of 3 layers of 128) or like a 135M decoder cut to --layers; --batch
rows, of which each next one is 8 tokens shorter. Forward and backward of both sides run in turns in one process, the
side that goes first changes. Losses of both must agree within 1e-5. Reported is the median of the ratios of times
(above 1: without the mask is faster), with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, ViTConfig

from unclipped.models.configuration import UnclippedConfig
from unclipped.models.modeling import UnclippedForConditionalGeneration
from unclipped.objectives.answer import AnswerObjective

EXAMPLES = """examples:
  python benchmarks/padded_rows.py --threads 1
  python benchmarks/padded_rows.py --shape 135m --layers 4 --tokens 1024 2048 --batch 2 --threads 2
"""
SHAPES: dict[str, dict[str, Any]] = {
    "pages": {
        "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "vocab_size": 128,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "vocab_size": 49_152,
    },
}  # fmt: skip
PATCH, TEXT, SHORTER = 8, 32, 8  # px; text tokens of the longest row; tokens by which each next row is shorter


class Masked(AnswerObjective):
    """The objective with every mask kept."""

    def _is_plainly_causal(self, mask: torch.Tensor) -> bool:
        return False


def build(arguments: argparse.Namespace) -> UnclippedForConditionalGeneration:
    torch.manual_seed(0)
    vision = ViTConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384, image_size=64,
        patch_size=PATCH,
    )  # fmt: skip
    text = Qwen3Config(**SHAPES[arguments.shape], num_hidden_layers=arguments.layers, max_position_embeddings=65_536)
    config = UnclippedConfig(
        vision_config=vision, text_config=text, connector_config="linear", image_token_id=0, vision_tile=[8, 8]
    )
    return UnclippedForConditionalGeneration(config).to(arguments.device).train()


def batch_of(tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of about so many visual tokens, a square of whole tiles, and text behind; the last three are predicted."""
    generator = torch.Generator().manual_seed(1)
    side = 8 * max(1, round(math.sqrt(tokens) / 8))
    rows, visual, length = arguments.batch, side * side, side * side + TEXT
    ids = torch.randint(1, 128, (rows, length), generator=generator)  # (B, L)
    ids[:, :visual] = 0
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row in range(rows):
        end = length - SHORTER * min(row, TEXT // SHORTER - 1)
        mask[row, end:] = 0
        labels[row, end - 3 : end] = ids[row, end - 3 : end]
    pixels = torch.randn(rows * visual, 3 * PATCH**2, generator=generator)
    batch = {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels,
        "position_ids": torch.arange(length).repeat(rows, 1), "image_grid_thw": torch.tensor([[1, side, side]] * rows),
    }  # fmt: skip
    return {name: value.to(arguments.device) for name, value in batch.items()}


def step(objective: AnswerObjective, batch: dict[str, Any], device: str) -> tuple[float, float]:
    """Seconds and loss of a forward and a backward pass."""
    objective.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = objective(**batch)["loss"]
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, float(loss.detach())


def measure(model: UnclippedForConditionalGeneration, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    sides = {"causal": AnswerObjective(model), "masked": Masked(model)}
    batch = batch_of(tokens, arguments)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-1, arguments.repeats):  # the first warms up
        losses = {}
        for name in list(sides) if repeat % 2 else list(reversed(sides)):
            seconds, losses[name] = step(sides[name], batch, arguments.device)
            if repeat >= 0:
                times[name].append(seconds)
        if abs(losses["causal"] - losses["masked"]) > 1e-5 * abs(losses["masked"]):
            raise SystemExit(f"{tokens} tokens: the sides disagree: {losses}")
    ratios = [masked / causal for causal, masked in zip(times["causal"], times["masked"], strict=True)]
    return {
        "visual_tokens": int((batch["input_ids"][0] == 0).sum()), "causal_seconds": statistics.median(times["causal"]),
        "masked_seconds": statistics.median(times["masked"]), "ratio": statistics.median(ratios), "low": min(ratios),
        "high": max(ratios),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="pages")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="visual tokens of a row")
    parser.add_argument("--layers", type=int, default=3, help="of the language model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write figures and settings here")
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error(f"--batch: at least 2 rows, of which one is padded; found {arguments.batch}")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model, rows = build(arguments), []
    for tokens in arguments.tokens:
        row = measure(model, tokens, arguments)
        rows.append(row)
        print(
            f"{row['visual_tokens']:6d} visual tokens  with mask {row['masked_seconds']:.2f} s  without "
            f"{row['causal_seconds']:.2f} s  ratio {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
