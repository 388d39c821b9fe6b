"""Time and memory of sparse prefill against dense: attention alone, the whole prefill, time to first token by parts.

All sides run in one process and in turns; the side that begins changes from repeat to repeat. Speed-up is the median of
the ratios of a repeat. Efficiency is speed-up × density: 1 when all saved work is saved time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from unclipped.attention.calibration import processor_name
from unclipped.attention.patterns import Pattern
from unclipped.attention.plan import BlockPlan, build_plan
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.sparse import sparse_attention
from unclipped.core.files import write_json
from unclipped.core.progress import counting
from unclipped.evaluation.predictions import fingerprint
from unclipped.evaluation.runner import default_console
from unclipped.evaluation.sparse.config import BenchConfig, PatternArm
from unclipped.evaluation.sparse.memory import peak_bytes
from unclipped.evaluation.sparse.quality import pattern_of
from unclipped.evaluation.sparse.rows import MeasuredRows
from unclipped.evaluation.sparse.scaling import amdahl, attention_share, exponent
from unclipped.evaluation.sparse.subjects import Input, Subject, check_positions, layer_states, open_subject, timed

RESULTS_FILE = "results.json"
_FORM = 2  # of what is kept of a length
PARTS = ("decode", "encoder", "connector", "prefill", "first step")


@dataclass(frozen=True)
class _Arm:
    """A pattern for one model."""

    config: PatternArm
    pattern: Pattern

    @property
    def blocks(self) -> dict[str, Any]:
        return {"key_block": self.config.key_block, "query_block": self.config.query_block}


def measure_speed(
    config: BenchConfig, output: str | Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Time all lengths and write OUTPUT/results.json; finished lengths stand in OUTPUT/lengths.jsonl.

    Raises UsageError for what cannot be timed: lengths beyond the model's positions, patterns that do not fit it.
    """
    output, console = Path(output), console or default_console()
    subject = open_subject(config)
    check_positions(subject.model, max(config.tokens))
    arms = [_Arm(arm, pattern_of(arm, subject.model)[0]) for arm in config.patterns]
    machine = {
        "device": processor_name() if subject.device.type == "cpu" else torch.cuda.get_device_name(subject.device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
    }
    file = MeasuredRows(output / "lengths.jsonl", fingerprint({**machine, "form": _FORM}), resume=resume)
    done = sum(str(tokens) in file for tokens in config.tokens)
    with counting("timing lengths", len(config.tokens), done, console) as counter:
        for tokens in config.tokens:
            if str(tokens) not in file:
                file.add(str(tokens), measure_length(subject, arms, tokens, config))
                counter.advance(1)
    rows = [file[str(tokens)] for tokens in config.tokens]
    results = {
        "model": config.model,
        **machine,
        "repeats": config.repeats,
        "shape": subject.shape,
        "lengths": rows,
        "exponents": exponents(rows),
    }
    write_json(output / RESULTS_FILE, results)
    print_speed(results, console)
    return results


@torch.inference_mode()
def measure_length(subject: Subject, arms: Sequence[_Arm], tokens: int, config: BenchConfig) -> dict[str, Any]:
    """Everything at one length."""
    given = subject.make(tokens)
    shape = subject.shape
    share = attention_share(
        given.tokens, **{name: shape[name] for name in ("heads", "head_dim", "linear_parameters")}
    )  # fmt: skip
    kernel = measure_kernel(subject, arms, given, config)
    prefill = measure_prefill(subject, arms, tokens, given, config)
    rows = {}
    for arm in arms:
        name = arm.config.label
        density = prefill["arms"][name]["density"]
        rows[name] = {
            "kernel": kernel["arms"][name],
            "prefill": prefill["arms"][name],
            "bound_at_density": amdahl(share, density),
        }
    return {
        "tokens": given.tokens,
        "visual_tokens": given.visual_tokens,
        "attention_share": share,
        "bound": amdahl(share),
        "dense": {"kernel": kernel["dense"], "prefill": prefill["dense"]},
        "patterns": rows,
    }


def in_turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """What each side returns, `repeats` times after one to warm up; the order turns by one each time."""
    names = list(sides)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for repeat in range(-1, repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            result = sides[name]()
            if repeat >= 0:
                found[name].append(result)
    return found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median with the smallest and the largest."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def ratio(dense: Sequence[float], sparse: Sequence[float]) -> dict[str, float]:
    """Dense over sparse, repeat by repeat."""
    return spread([one / two for one, two in zip(dense, sparse, strict=True)])


def measure_kernel(subject: Subject, arms: Sequence[_Arm], given: Input, config: BenchConfig) -> dict[str, Any]:
    """Attention of one layer alone, on random states of its shape; a plan's own time is told apart."""
    query, key, value = layer_states(subject, given.tokens, config.seed)
    scale, device = query.shape[-1] ** -0.5, subject.device

    def dense() -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def plan_of(arm: _Arm) -> BlockPlan:
        return build_plan(
            arm.pattern.for_layer(0), given.layout, **arm.blocks, query=query[0], key=key[0], scale=scale
        )  # fmt: skip

    def sparse(arm: _Arm) -> tuple[float, float]:
        plan, plan_seconds = timed(lambda: plan_of(arm), device)
        _, seconds = timed(lambda: sparse_attention(query, key, value, plan, scale=scale), device)
        return plan_seconds, seconds

    sides: dict[str, Callable[[], Any]] = {"": lambda: timed(dense, device)[1]}
    sides |= {arm.config.label: lambda arm=arm: sparse(arm) for arm in arms}
    found = in_turns(sides, config.repeats)
    rows = {}
    for arm in arms:
        plans, seconds = zip(*found[arm.config.label], strict=True)
        plan = plan_of(arm)
        ratios = ratio(found[""], [one + two for one, two in zip(plans, seconds, strict=True)])
        rows[arm.config.label] = {
            "density": plan.density,
            "plan_seconds": spread(plans),
            "attention_seconds": spread(seconds),
            "speed_up": ratios,
            "efficiency": ratios["median"] * plan.density,
            "peak_bytes": peak_bytes(lambda plan=plan: sparse_attention(query, key, value, plan, scale=scale), device),
        }
    return {"dense": {"seconds": spread(found[""]), "peak_bytes": peak_bytes(dense, device)}, "arms": rows}


def measure_prefill(
    subject: Subject, arms: Sequence[_Arm], tokens: int, given: Input, config: BenchConfig
) -> dict[str, Any]:
    """Whole prefill, logits of the last token, and one decode step; the parts before it once a repeat."""
    from transformers import DynamicCache

    model, device = subject.model, subject.device
    reports: dict[str, Any] = {}
    plan_shares: dict[str, list[float]] = {arm.config.label: [] for arm in arms}

    def forward() -> tuple[float, float]:
        cache = DynamicCache(config=model.config.get_text_config())
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        output, seconds = timed(lambda: model(**given.arguments, **options), device)
        token = output.logits[:, -1].argmax(dim=-1)[:, None]  # (1, 1)
        _, step = timed(lambda: model(input_ids=token, **options), device)
        return seconds, step

    def under(arm: _Arm) -> tuple[float, float]:
        with sparse_prefill(
            model, arm.pattern, fallback=arm.config.fallback, layouts=[given.layout], **arm.blocks,
            calibration=arm.config.calibration,
        ) as sparse:  # fmt: skip
            result = forward()
            reports[arm.config.label] = sparse.summary()
            plan_seconds = sum(record.plan_seconds for record in sparse.report())
        plan_shares[arm.config.label].append(plan_seconds / result[0])
        return result

    parts: dict[str, list[float]] = {name: [seconds] for name, seconds in given.parts.items()}
    for _ in range(config.repeats if given.parts else 0):
        for name, seconds in subject.make(tokens).parts.items():
            parts[name].append(seconds)
    before = {name: spread(seconds[1:]) for name, seconds in parts.items()}  # the first one warmed up
    sides: dict[str, Callable[[], tuple[float, float]]] = {"": forward}
    sides |= {arm.config.label: lambda arm=arm: under(arm) for arm in arms}
    found = in_turns(sides, config.repeats)

    def row(name: str, peak: int | None) -> dict[str, Any]:
        seconds, steps = zip(*found[name], strict=True)
        split = {**before, "prefill": spread(seconds), "first step": spread(steps)}
        first = sum(part["median"] for part in split.values())
        return {"parts": split, "first_token_seconds": first, "peak_bytes": peak}

    rows = {}
    for arm in arms:
        name = arm.config.label
        summary = reports[name]
        ratios = ratio([seconds for seconds, _ in found[""]], [seconds for seconds, _ in found[name]])
        shares = plan_shares[name][1:]  # the first one warmed up
        rows[name] = {
            **row(name, peak_bytes(lambda arm=arm: under(arm), device)),
            "plan_share": spread(shares),
            "speed_up": ratios,
            "density": summary.density,
            "efficiency": ratios["median"] * summary.density,
            "sparse_layers": summary.sparse_layers,
            "layers": summary.layers,
            "dense_because": list(summary.reasons),
        }
    return {"dense": row("", peak_bytes(forward, device)), "arms": rows}


def exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Fitted exponents of attention and prefill time over tokens, of each side; null below two lengths."""
    lengths = [row["tokens"] for row in rows]

    def fit(of: Callable[[Mapping[str, Any]], float]) -> float | None:
        return exponent(lengths, [of(row) for row in rows])

    found = {
        "dense": {
            "kernel": fit(lambda row: row["dense"]["kernel"]["seconds"]["median"]),
            "prefill": fit(lambda row: row["dense"]["prefill"]["parts"]["prefill"]["median"]),
        }
    }
    for name in rows[0]["patterns"]:
        found[name] = {
            "kernel": fit(
                lambda row, name=name: (
                    row["patterns"][name]["kernel"]["plan_seconds"]["median"]
                    + row["patterns"][name]["kernel"]["attention_seconds"]["median"]
                )
            ),
            "prefill": fit(lambda row, name=name: row["patterns"][name]["prefill"]["parts"]["prefill"]["median"]),
        }
    return found


def print_speed(results: Mapping[str, Any], console: Console) -> None:
    """Three tables on the terminal: attention alone, whole prefill, time to first token."""
    console.print(
        f"{results['model']} on {results['device']}, {results['threads']} threads, {results['dtype']}; median of "
        f"{results['repeats']} interleaved repeats [smallest, largest]",
        markup=False,
    )
    for part, title in (("kernel", "attention of one layer alone, plan included"), ("prefill", "whole prefill")):
        table = Table(title=title, title_justify="left")
        table.add_column("tokens", justify="right")
        table.add_column("pattern", overflow="fold")
        for name in (
            "density",
            "dense s",
            "sparse s",
            "plans",
            "speed-up",
            "efficiency",
            "at most",
            "peak MiB (dense)",
        ):
            table.add_column(name, justify="right", no_wrap=name == "speed-up")
        for row in results["lengths"]:
            for name, found in row["patterns"].items():
                table.add_row(f"{row['tokens']:,}", name, *_speed_cells(row, found, part))
        console.print(table)
    table = Table(title="time to first token, seconds", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("prefill", overflow="fold")
    shown = [name for name in PARTS if name in results["lengths"][0]["dense"]["prefill"]["parts"]]
    for name in (*shown, "all"):
        table.add_column(name, justify="right")
    for row in results["lengths"]:
        sides = {"dense": row["dense"]["prefill"], **{n: found["prefill"] for n, found in row["patterns"].items()}}
        for name, side in sides.items():
            cells = [f"{side['parts'][part]['median']:.3f}" for part in shown]
            table.add_row(f"{row['tokens']:,}", name, *cells, f"{side['first_token_seconds']:.3f}")
            for reason in side.get("dense_because", ()):
                table.add_row("", f"  dense in {side['layers'] - side['sparse_layers']} layers: {reason}")
    console.print(table)
    if len(results["lengths"]) > 1:
        for name, found in results["exponents"].items():
            console.print(
                f"time grows as tokens^x: {name}: attention {found['kernel']:.2f}, prefill {found['prefill']:.2f}",
                markup=False,
            )


def _speed_cells(row: Mapping[str, Any], found: Mapping[str, Any], part: str) -> list[str]:
    own, dense = found[part], row["dense"][part]
    if part == "kernel":
        dense_seconds = dense["seconds"]["median"]
        seconds = own["plan_seconds"]["median"] + own["attention_seconds"]["median"]
        most, plans = 1.0 / own["density"], own["plan_seconds"]["median"] / seconds
    else:
        dense_seconds, seconds = dense["parts"]["prefill"]["median"], own["parts"]["prefill"]["median"]
        most, plans = found["bound_at_density"], own["plan_share"]["median"]
    speed = own["speed_up"]
    return [
        f"{own['density']:.3f}", f"{dense_seconds:.4f}", f"{seconds:.4f}", f"{plans:.1%}",
        f"{speed['median']:.2f} [{speed['least']:.2f}, {speed['most']:.2f}]", f"{own['efficiency']:.2f}",
        f"{most:.2f}", f"{_mebibytes(own['peak_bytes'])} ({_mebibytes(dense['peak_bytes'])})",
    ]  # fmt: skip


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f}"
