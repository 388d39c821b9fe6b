"""Sparse prefill on a GPU in one process: agreement, attention alone, the whole prefill; figures as JSON.

agreement: the Triton kernels in bfloat16 against float64 by the definition, forward and backward.
attention: forward time, speed-up and efficiency (speed-up × density) against the fastest dense attention of torch
(flash or cuDNN); building the plan and its tables is timed apart. --backward times forward and backward together.
prefill: a decoder of the shape of Qwen3-0.6B with random weights, logits of the last token: the sparse run against the
fastest dense one, in turns; time to first token (from ids on the device to the token's id on the host) and peak memory.
--tune first tries sizes of tiles for the forward kernel and goes on with the fastest.
--dry-run does all of it on a CPU with a tiny shape: with the Triton kernels under TRITON_INTERPRET=1, else `gather`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3Config, Qwen3ForCausalLM

from sparse_attention import patterns_for
from sparse_prefill import TEXT
from unclipped.attention import triton_backend
from unclipped.attention.layout import Layout
from unclipped.attention.plan import BlockPlan, build_plan
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.sparse import sparse_attention
from unclipped.attention.syntax import parse_pattern
from unclipped.attention.triton_backend import Tiling

EXAMPLES = """examples:
  python benchmarks/sparse_prefill_gpu.py --tune --json gpu.json
  TRITON_INTERPRET=1 python benchmarks/sparse_prefill_gpu.py --dry-run
"""
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PARTS = ("agreement", "attention", "prefill")


class Machine:
    """Device, shapes and clocks of a run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.is_dry = arguments.dry_run
        self.device = torch.device("cpu" if self.is_dry else "cuda")
        self.dtype = torch.bfloat16
        self.repeats = arguments.repeats
        interpreted = triton_backend.find_spec("triton") is not None and triton_backend.is_interpreted()
        self.backend = arguments.backend or ("triton" if not self.is_dry or interpreted else "gather")
        self.heads, self.key_heads, self.width = (4, 2, 16) if self.is_dry else (16, 8, 128)
        self.blocks: dict[str, Any] = (
            {"key_block": 16, "query_block": 32} if self.is_dry else {"key_block": 128, "query_block": 256}
        )

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def dense_choices(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        if self.is_dry:
            return {"torch": nullcontext}
        return {name: lambda kind=kind: sdpa_kernel(kind) for name, kind in DENSE.items()}

    def states(self, length: int, heads: Sequence[int], width: int, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        return [
            torch.randn(1, count, length, width, generator=generator, device=self.device).to(dtype) for count in heads
        ]

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Most memory of the device during a call; nothing is measured on a CPU."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronise()
        return torch.cuda.max_memory_allocated()

    def patterns(self, length: int) -> list[str]:
        return ["sink(16) + window(48)", "topk(2)"] if self.is_dry else patterns_for(length)


def page(length: int, columns: int) -> Layout:
    """Text, one image, text."""
    text = min(TEXT, length // 8)
    visual = (length - 2 * text) // columns * columns
    types = [0] * text + [1] * visual + [0] * (length - text - visual)
    return Layout.from_token_types(types, [(1, visual // columns, columns)])


def agreement(machine: Machine) -> list[dict[str, Any]]:
    """Largest errors, those of gradients relative to the largest gradient (or 1)."""
    rows = []
    shapes = [(4, 2, 16)] if machine.is_dry else [(16, 8, 128), (8, 8, 64), (14, 2, 64), (8, 1, 80), (4, 2, 256)]
    length = 200 if machine.is_dry else 2100
    for (heads, key_heads, width), offset in itertools.product(shapes, (0, length // 3)):
        for text in ("full", machine.patterns(8192)[0], "topk(2)", "global_text + sink + window2d(4, 4)"):
            query, key, value = machine.states(length, (heads, key_heads, key_heads), width, machine.dtype)
            leaves = [s.requires_grad_() for s in (query[:, :, offset:].contiguous(), key, value)]
            exact = [s.detach().double().requires_grad_() for s in leaves]
            given = {"query": leaves[0][0], "key": leaves[1][0], "offset": offset, **machine.blocks}
            plan = build_plan(parse_pattern(text), page(length, 16), **given)
            own = sparse_attention(*leaves, plan, scale=width**-0.5, backend=machine.backend)
            wanted = sparse_attention(*exact, plan, scale=width**-0.5, backend="reference")
            upstream = torch.randn_like(own)
            gradients = torch.autograd.grad(own, leaves, upstream)
            exact_gradients = torch.autograd.grad(wanted, exact, upstream.double())
            errors = [
                float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
                for a, b in zip(gradients, exact_gradients, strict=True)
            ]
            forward = float((own - wanted).detach().abs().max())
            rows.append(
                {"pattern": text, "heads": heads, "key_heads": key_heads, "width": width, "offset": offset,
                 "output_error": forward, "gradient_errors": errors, "agrees": max(forward, *errors) < 2e-2}
            )  # fmt: skip
            print(
                f"agreement {heads}:{key_heads}×{width} from {offset:4d} {text:36s} output {forward:.1e} gradients "
                f"{' '.join(f'{e:.1e}' for e in errors)} {'' if rows[-1]['agrees'] else 'DIFFERS'}",
                flush=True,
            )
    return rows


def tune(machine: Machine, length: int) -> list[dict[str, Any]]:
    """Times of the forward kernel by sizes of tiles; the fastest is used from then on."""
    states = machine.states(length, (machine.heads, machine.key_heads, machine.key_heads), machine.width, machine.dtype)
    plan = build_plan(parse_pattern(machine.patterns(length)[0]), page(length, 64), **machine.blocks)
    name = (triton_backend.padded_width(machine.width), machine.dtype.itemsize)
    usual = triton_backend.tilings_for(machine.width, machine.dtype)
    rows: list[dict[str, Any]] = []
    sizes = itertools.product((64, 128), (32, 64, 128), (64,), (4, 8), (2, 3, 4))
    for tiling in (Tiling(16, 16, 16, 4, 2), usual.forward) if machine.is_dry else itertools.starmap(Tiling, sizes):
        triton_backend.CHOSEN[name] = replace(usual, forward=tiling)
        row: dict[str, Any] = {**vars(tiling), "seconds": None, "reason": None}
        try:
            with torch.no_grad():
                times = [
                    machine.seconds(lambda: sparse_attention(*states, plan, scale=0.1, backend="triton"))
                    for _ in range(machine.repeats + 2)
                ]
            row["seconds"] = statistics.median(times[2:])
        except Exception as error:
            # Tiles that do not fit the device's shared memory are a result, told as such.
            if type(error).__name__ not in ("OutOfResources", "PTXASError"):
                raise
            row["reason"] = str(error).splitlines()[0]
        rows.append(row)
    best = min((row for row in rows if row["seconds"] is not None), key=lambda row: row["seconds"])
    fields = {key: best[key] for key in ("rows", "columns", "masked", "warps", "stages")}
    triton_backend.CHOSEN[name] = replace(usual, forward=Tiling(**fields))
    print(f"tiles: fastest {fields}, {best['seconds'] * 1e3:.3f} ms of {len(rows)} tried", flush=True)
    return rows


def time_in_turns(machine: Machine, sides: dict[str, Callable[[], object]]) -> tuple[dict[str, list[float]], dict]:
    """Seconds of each side, in turns with a changing first one; sides that cannot run, and why."""
    refused: dict[str, str] = {}
    for name, run in sides.items():  # also compiles
        try:
            run()
            run()
        except RuntimeError as error:
            if "kernel" not in str(error).lower() or name in ("sparse",):
                raise
            refused[name] = str(error).splitlines()[0]
    names = [name for name in sides if name not in refused]
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(machine.repeats):
        for name in names if repeat % 2 else names[::-1]:
            times[name].append(machine.seconds(sides[name]))
    return times, refused


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """The sparse side against the fastest of the others."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    dense = [name for name in times if name != "sparse"]
    if not dense:
        raise SystemExit("no dense attention of torch runs on this device: nothing to compare with")
    best = min(dense, key=lambda name: middle[name])
    ratios = [theirs / own for own, theirs in zip(times["sparse"], times[best], strict=True)]
    return {"seconds": middle, "best_dense": best, "speedup": statistics.median(ratios),
            "low": min(ratios), "high": max(ratios)}  # fmt: skip


def attention(machine: Machine, length: int, text: str, with_backward: bool) -> dict[str, Any]:
    shape = (machine.heads, machine.key_heads, machine.key_heads)
    states = [s.requires_grad_(with_backward) for s in machine.states(length, shape, machine.width, machine.dtype)]
    upstream = torch.randn_like(states[0])
    layout, scale = page(length, 16 if machine.is_dry else 64), machine.width**-0.5
    pattern = parse_pattern(text)

    def plan_now() -> BlockPlan:
        return build_plan(pattern, layout, **machine.blocks, query=states[0][0], key=states[1][0])

    plan = plan_now()

    def finish(output: Tensor) -> object:
        return torch.autograd.grad(output, states, upstream) if with_backward else output

    def sparse() -> object:
        return finish(sparse_attention(*states, plan, scale=scale, backend=machine.backend))

    def dense(choice: Callable[[], AbstractContextManager[Any]]) -> object:
        with choice():
            return finish(F.scaled_dot_product_attention(*states, is_causal=True, scale=scale, enable_gqa=True))

    sides: dict[str, Callable[[], object]] = {"sparse": sparse}
    sides |= {name: lambda choice=choice: dense(choice) for name, choice in machine.dense_choices().items()}
    with torch.set_grad_enabled(with_backward):
        times, refused = time_in_turns(machine, sides)
        planning = statistics.median(machine.seconds(plan_now) for _ in range(3))
        tables = machine.seconds(lambda: triton_backend.PlanTables(plan, machine.device))
    row = {"length": length, "pattern": text, "backward": with_backward, "density": plan.density, **compared(times)}
    row |= {"efficiency": row["speedup"] * plan.density, "plan_seconds": planning, "table_seconds": tables}
    print(
        f"attention {length:6d} {text:28s} {'forward+backward' if with_backward else 'forward'} density "
        f"{plan.density:.3f}  sparse {row['seconds']['sparse'] * 1e3:.2f} ms  {row['best_dense']} "
        f"{row['seconds'][row['best_dense']] * 1e3:.2f} ms  ×{row['speedup']:.2f} [{row['low']:.2f}, "
        f"{row['high']:.2f}]  efficiency {row['efficiency']:.2f}  plan {planning * 1e3:.1f} ms",
        flush=True,
    )
    return row | {"refused": refused}


def decoder(machine: Machine, layers: int, longest: int) -> Qwen3ForCausalLM:
    wide, vocabulary = (64, 1000) if machine.is_dry else (1024, 151_936)
    config = Qwen3Config(
        hidden_size=wide, intermediate_size=3 * wide, num_hidden_layers=layers, num_attention_heads=machine.heads,
        num_key_value_heads=machine.key_heads, head_dim=machine.width, vocab_size=vocabulary,
        max_position_embeddings=2 * longest, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(machine.device, machine.dtype).eval()


@torch.no_grad()
def prefill(machine: Machine, model: Qwen3ForCausalLM, length: int, text: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(machine.device)
    layout = page(length, 16 if machine.is_dry else 64)
    reports: list[Any] = []

    def first_token() -> int:
        return int(model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    def sparse() -> int:
        """With entering and leaving, and building the plan."""
        with sparse_prefill(
            model, text, fallback="never", layouts=[layout], backend=machine.backend, **machine.blocks
        ) as held:
            token = first_token()
            reports[:] = held.report()
        return token

    def dense(choice: Callable[[], AbstractContextManager[Any]]) -> int:
        with choice():
            return first_token()

    sides: dict[str, Callable[[], object]] = {"sparse": sparse}
    sides |= {name: lambda choice=choice: dense(choice) for name, choice in machine.dense_choices().items()}
    times, refused = time_in_turns(machine, sides)
    row = {"length": length, "pattern": text, "density": sum(r.density for r in reports) / len(reports)}
    row |= compared(times)
    row |= {"peak_bytes": {name: machine.peak_bytes(sides[name]) for name in times}, "refused": refused}
    print(f"prefill   {length:6d} {text:28s} density {row['density']:.3f}  time to first token: sparse "
          f"{row['seconds']['sparse'] * 1e3:.1f} ms  {row['best_dense']} "
          f"{row['seconds'][row['best_dense']] * 1e3:.1f} ms  ×{row['speedup']:.2f} [{row['low']:.2f}, "
          f"{row['high']:.2f}]  peak {row['peak_bytes']}", flush=True)  # fmt: skip
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--length", type=int, nargs="+", help="of attention alone; default: 8k, 16k, 32k, 64k")
    parser.add_argument("--prefill-length", type=int, nargs="+", help="of the whole prefill; default: 32k, 64k")
    parser.add_argument("--pattern", action="append", help="may be given again; default: windows, and top-k")
    parser.add_argument("--layers", type=int, help="default: 28")
    parser.add_argument("--backend", choices=("triton", "flex", "gather"), help="default: triton")
    parser.add_argument("--backward", action="store_true", help="time forward and backward of attention too")
    parser.add_argument("--tune", action="store_true", help="try sizes of tiles for the forward kernel first")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU: shows that the command works")
    parser.add_argument("--json", metavar="FILE", help="write figures and settings here")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; use --dry-run to see the command work on a CPU")
    if arguments.repeats < 1:
        parser.error(f"--repeats: expected at least 1, found {arguments.repeats}")
    arguments.length = arguments.length or ([256] if arguments.dry_run else [8192, 16_384, 32_768, 65_536])
    arguments.prefill_length = arguments.prefill_length or ([256] if arguments.dry_run else [32_768, 65_536])
    arguments.layers = arguments.layers or (2 if arguments.dry_run else 28)
    return arguments


def main() -> None:
    arguments = parse()
    machine = Machine(arguments)
    name = "CPU (dry run: times mean nothing)" if machine.is_dry else torch.cuda.get_device_name()
    triton_version = getattr(__import__("triton"), "__version__", None) if machine.backend == "triton" else None
    result: dict[str, Any] = {
        "settings": vars(arguments), "device": name, "backend": machine.backend, "torch": torch.__version__,
        "triton": triton_version,
    }  # fmt: skip
    print(f"{name}, torch {torch.__version__}, triton {triton_version}, backend {machine.backend}", flush=True)

    def keep() -> None:
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")

    if "agreement" in arguments.parts:
        result["agreement"] = agreement(machine)
        keep()
    if arguments.tune and machine.backend == "triton":
        result["tiles"] = tune(machine, max(arguments.length) // 2)
        keep()
    if "attention" in arguments.parts:
        rows = result["attention"] = []
        for length in arguments.length:
            for text in arguments.pattern or machine.patterns(length):
                for with_backward in (False, True) if arguments.backward else (False,):
                    rows.append(attention(machine, length, text, with_backward))
                    keep()
    if "prefill" in arguments.parts:
        model, rows = decoder(machine, arguments.layers, max(arguments.prefill_length)), []
        result["prefill"] = rows
        for length in arguments.prefill_length:
            for text in arguments.pattern or machine.patterns(length):
                rows.append(prefill(machine, model, length, text))
                keep()
    if any(not row["agrees"] for row in result.get("agreement", [])):
        raise SystemExit("the kernels differ from the definition: see the lines marked DIFFERS")


if __name__ == "__main__":
    main()
