"""`unclipped prefill quality | bench | search`: what a sparse prefill keeps, what it gains, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

HELP = """Measure sparse prefill: what a pattern keeps (quality), what it gains (bench), which one to take (search).

Examples:

  unclipped prefill quality model --data ./my-folder --pattern "topk(8)" --limit 100 --output runs/quality

  unclipped prefill bench 0.6b --tokens 1024,4096 --pattern "topk(8)" --output runs/bench

  unclipped prefill search model --data ./my-folder --bound kl=0.05 --limit 64 --output runs/search
"""

QUALITY = """What patterns keep on your own questions, against dense prefill.

Recovered attention mass by layer, head and modality pair, beside random and oracle selection of as many blocks;
KL and top-1 agreement of the next token; the task's score with its paired difference. OUTPUT gets results.json and
report.html.

Examples:

  unclipped prefill quality model --data ./my-folder --pattern "sink(128) + window(512)" --pattern "topk(8)"
  --limit 200 --output runs/quality

  unclipped prefill quality model --data generated:needle --pattern runs/search/pattern.yaml --limit 90
  --output runs/needle

  unclipped prefill quality model --data ./my-folder --pattern "topk(8)" --no-score --limit 20 --output runs/quality
"""

BENCH = """Time and memory of a sparse prefill against dense.

MODEL is a model folder in our format, the folder of a decoder, or a shape with random weights (0.6b, 1.7b, 8b).
Attention alone, the whole prefill, time to first token by its parts and peak memory, in interleaved repeats, with
density, efficiency (speed-up x density), the scaling exponent and Amdahl's bound beside.

Examples:

  unclipped prefill bench 0.6b --layers 4 --tokens 1024,4096,8192 --pattern "topk(8)" --threads 1 --output runs/bench

  unclipped prefill bench model --tokens 4096 --pattern "global_text + sink(128) + topk(8)" --output runs/bench
"""

SEARCH = """Find for each layer the cheapest pattern that keeps attention and next token within a bound.

Half of the prompts choose, the other half verify; the interval of the KL says whether they are enough. OUTPUT gets
pattern.yaml, which `--sparse`, `--pattern` and recipes take in the place of a pattern's text, and the frontier (density
against KL and recovered mass) as frontier.svg, results.json and report.html, beside random and oracle selection at
equal density.

Examples:

  unclipped prefill search model --data ./my-folder --bound kl=0.05 --limit 64 --output runs/search

  unclipped prefill search model --data ./my-folder --bound kl=0.05 --bound mass=0.9 --density 0.25 --per-head
  --limit 64 --output runs/search

  unclipped prefill search model --data ./my-folder --candidate "topk(4)" --candidate "topk(16)" --output runs/search
"""


def register(app: typer.Typer) -> None:
    """Enter the commands."""
    group = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, add_completion=False)
    group.command("quality", help=QUALITY)(quality)
    group.command("bench", help=BENCH)(bench)
    group.command("search", help=SEARCH)(search)
    app.add_typer(group, name="prefill")


_MODEL = typer.Argument(..., help="Model folder (or hub id of a model in our format).")
_OVERRIDES = typer.Argument(None, help="Changes to the settings, key.path=value.")
_DATA = typer.Option(..., help="A data set: a folder or file, or generated:NAME.")
_SPLIT = typer.Option("val", help="Split of --data.")
_OUTPUT = typer.Option(..., help="Run folder for measurements, tables and plots.")
_KEY_BLOCK = typer.Option(None, help="Keys in a block (128, or as a pattern file says).")
_QUERY_BLOCK = typer.Option(None, help="Queries that share a list of blocks (256, or as a pattern file says).")
_DEVICE = typer.Option("auto", help="auto, cpu, cuda or mps.")
_THREADS = typer.Option(None, min=1, help="Threads of torch, pinned.")
_RESUME = typer.Option(False, "--resume", help="Go on with an interrupted run in OUTPUT.")
_PATTERN = typer.Option(..., help="A pattern or a pattern file; may be given again.")
_SCORER = typer.Option("exact_match", help="Scorer of the answers, for --score.")
_MAX_NEW_TOKENS = typer.Option(32, help="Longest answer in tokens, for --score.")
_BATCH_SIZE = typer.Option(8, help="Questions a batch, for --score.")

_FOR_SCORE = ("scorer", "max_new_tokens", "batch_size")


def quality(
    context: typer.Context,
    model: str = _MODEL,
    overrides: list[str] = _OVERRIDES,
    data: str = _DATA,
    pattern: list[str] = _PATTERN,
    output: Path = _OUTPUT,
    split: str = _SPLIT,
    limit: int = typer.Option(None, help="At most this many items."),
    scorer: str = _SCORER,
    max_new_tokens: int = _MAX_NEW_TOKENS,
    score: bool = typer.Option(True, "--score/--no-score", help="Also answer the questions and compare the scores."),
    batch_size: int = _BATCH_SIZE,
    key_block: int = _KEY_BLOCK,
    query_block: int = _QUERY_BLOCK,
    device: str = _DEVICE,
    threads: int = _THREADS,
    resume: bool = _RESUME,
) -> None:
    """Measure patterns (see QUALITY)."""
    from unclipped.cli.modes import refuse_unused
    from unclipped.evaluation.sparse.config import QualityConfig

    if not score:
        refuse_unused(context, "with --no-score", _FOR_SCORE)
    task = _task(data, split, limit, scorer, max_new_tokens)
    arms = [_arm(text, key_block, query_block) for text in pattern]
    settings = {"model": model, "task": task, "patterns": arms, "score": score, "batch_size": batch_size}
    with _run("prefill quality", settings, QualityConfig, overrides, output, resume, threads) as config:
        from unclipped.evaluation.sparse.quality import measure_quality
        from unclipped.studies.prefill_report import write_quality_report

        results = measure_quality(config, output, resume=resume, device=device)
        typer.echo(f"wrote {write_quality_report(output / 'report.html', results)}")


def bench(
    model: str = typer.Argument(..., help="Model folder, decoder folder, or a shape: 0.6b, 1.7b, 8b."),
    overrides: list[str] = _OVERRIDES,
    pattern: list[str] = _PATTERN,
    output: Path = _OUTPUT,
    tokens: str = typer.Option("1024,4096", help="Prompt lengths, parted by commas; of a VLM: visual tokens."),
    layers: int = typer.Option(None, help="Cut a shape to so many layers."),
    dtype: str = typer.Option("own", help="fp32, bf16, or own: the checkpoint's; bf16 for shapes."),
    fallback: str = typer.Option("never", help="never: always sparse; auto: dense where sparse does not pay."),
    repeats: int = typer.Option(7, help="Interleaved repeats."),
    key_block: int = _KEY_BLOCK,
    query_block: int = _QUERY_BLOCK,
    device: str = _DEVICE,
    threads: int = _THREADS,
    resume: bool = _RESUME,
) -> None:
    """Time patterns (see BENCH)."""
    from unclipped.core.errors import UsageError
    from unclipped.evaluation.sparse.config import BenchConfig

    try:
        lengths = [int(part) for part in tokens.split(",")]
    except ValueError:
        raise UsageError(f"--tokens: expected whole numbers parted by commas, found '{tokens}'") from None
    arms = [{**_arm(text, key_block, query_block), "fallback": fallback} for text in pattern]
    settings = {
        "model": model, "tokens": lengths, "patterns": arms, "layers": layers, "dtype": dtype, "device": device,
        "threads": threads, "repeats": repeats,
    }  # fmt: skip
    with _run("prefill bench", settings, BenchConfig, overrides, output, resume, threads) as config:
        from unclipped.evaluation.sparse.bench import measure_speed

        measure_speed(config, output, resume=resume)


def search(
    context: typer.Context,
    model: str = _MODEL,
    overrides: list[str] = _OVERRIDES,
    data: str = _DATA,
    output: Path = _OUTPUT,
    split: str = _SPLIT,
    limit: int = typer.Option(64, help="Prompts: every other one chooses, the rest verify."),
    bound: list[str] = typer.Option(["kl=0.05"], help="kl=NATS, mass=SHARE; may be given again."),
    density: float = typer.Option(1.0, help="Largest mean density allowed."),
    candidate: list[str] = typer.Option(None, help="A pattern to choose from; may be given again."),
    scorer: str = _SCORER,
    max_new_tokens: int = _MAX_NEW_TOKENS,
    score: bool = typer.Option(False, "--score", help="Also answer the questions at every point of the frontier."),
    batch_size: int = _BATCH_SIZE,
    per_head: bool = typer.Option(False, "--per-head", help="Choose for each key head as well."),
    rulers: bool = typer.Option(True, "--rulers/--no-rulers", help="Measure random and oracle selection as well."),
    key_block: int = _KEY_BLOCK,
    query_block: int = _QUERY_BLOCK,
    device: str = _DEVICE,
    threads: int = _THREADS,
    resume: bool = _RESUME,
) -> None:
    """Search a pattern (see SEARCH)."""
    from unclipped.cli.modes import refuse_unused
    from unclipped.evaluation.sparse.config import SearchConfig

    if not score:
        refuse_unused(context, "without --score", _FOR_SCORE, remedy="leave it out, or add --score")
    task = _task(data, split, limit, scorer, max_new_tokens)
    settings: dict[str, Any] = {
        "model": model, "task": task, "density": density, "per_head": per_head, "rulers": rulers,
        "score": score, "batch_size": batch_size,
        **_bounds(bound), **_blocks(key_block, query_block),
    }  # fmt: skip
    if candidate:
        settings["candidates"] = candidate
    with _run("prefill search", settings, SearchConfig, overrides, output, resume, threads) as config:
        from unclipped.evaluation.sparse.search import search_pattern
        from unclipped.studies.prefill_report import write_search_report

        results = search_pattern(config, output, resume=resume, device=device)
        typer.echo(f"wrote {write_search_report(output, results)}")


def _task(data: str, split: str, limit: int | None, scorer: str, max_new_tokens: int) -> dict[str, Any]:
    from unclipped.cli.evaluate import task_name

    source = {"source": data, "split": split}
    return {
        "name": task_name(data), "source": source, "limit": limit, "scorer": scorer, "max_new_tokens": max_new_tokens
    }  # fmt: skip


def _blocks(key_block: int | None, query_block: int | None) -> dict[str, int]:
    given = {"key_block": key_block, "query_block": query_block}
    return {name: size for name, size in given.items() if size is not None}


def _arm(text: str, key_block: int | None, query_block: int | None) -> dict[str, Any]:
    """A pattern's text or file as fields of `PatternArm`; a file is named after itself."""
    from unclipped.attention.pattern_file import is_pattern_file

    name = {"name": text} if is_pattern_file(text) else {}
    return {"pattern": text, **name, **_blocks(key_block, query_block)}


def _bounds(bounds: list[str]) -> dict[str, float]:
    """`kl=0.05` as fields of `SearchConfig`."""
    from unclipped.core.errors import UsageError, nearest

    found: dict[str, float] = {}
    for text in bounds:
        name, _, value = text.partition("=")
        if name not in ("kl", "mass"):
            raise UsageError(f"--bound {text}: unknown bound '{name}'; {nearest(name, ('kl', 'mass'))}")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"--bound {text}: expected a number behind '=', as in kl=0.05") from None
    return found


@contextmanager
def _run(
    where: str, settings: Any, schema: Any, overrides: list[str] | None, output: Path, resume: bool, threads: int | None
) -> Iterator[Any]:
    """The run folder, recorded, with the validated settings; threads pinned."""
    from unclipped.cli.record import record_run, run_folder
    from unclipped.recipes.loading import apply_overrides
    from unclipped.recipes.validation import validate

    config = validate(apply_overrides(settings, overrides or []), schema, where)
    with run_folder(output, resume=resume):
        record_run(config, output, resume=resume)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        yield config
