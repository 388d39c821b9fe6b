"""What patterns keep on a user's own prompts: attention mass, the next token, and the task's score, against dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from unclipped.attention.mass import PAIRS
from unclipped.attention.patterns import Pattern
from unclipped.attention.prefill import decoder_of, read_patterns
from unclipped.core.files import write_json
from unclipped.core.progress import counting
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.figures import Difference, Figure
from unclipped.evaluation.intervals import bootstrap, estimate
from unclipped.evaluation.questions import as_prompt, open_task
from unclipped.evaluation.runner import compare_folders, default_console, evaluate
from unclipped.evaluation.sparse.config import PatternArm, QualityConfig
from unclipped.evaluation.sparse.measures import Blocks, next_token, next_token_logits, prompt_mass, prompt_of
from unclipped.evaluation.sparse.rows import MeasuredRows
from unclipped.inference.engine import Engine

RESULTS_FILE = "results.json"
_KINDS = ("pattern", "oracle", "random")
_DIGITS = 7


def pattern_of(arm: PatternArm, model: Any) -> tuple[Pattern, Blocks]:
    """The pattern of an arm for a model, and its block sizes."""
    depth = int(decoder_of(model).config.num_hidden_layers)
    return read_patterns(arm.pattern, depth), (arm.key_block, arm.query_block)


def measure_quality(
    config: QualityConfig, output: str | Path, *, resume: bool = False, device: str = "auto", console: Any = None
) -> dict[str, Any]:
    """Measure and write OUTPUT/results.json; measured prompts stand in OUTPUT/prompts.jsonl as they are done.

    Raises UsageError for a pattern that does not fit the model, DataError for samples that cannot be used.
    """
    output, console = Path(output), console or default_console()
    engine = Engine(config.model, device=device)
    rows = _measured_prompts(engine, config, output, resume, console)
    results: dict[str, Any] = {
        "model": config.model,
        "task": config.task.name,
        "prompts": len(rows),
        "tokens": _spread([row["tokens"] for row in rows]),
        "layers": rows[0]["layers"],
        "attention": _attention(rows),
        "patterns": {
            arm.label: {"pattern": arm.pattern, **summary_of(rows, number, config)}
            for number, arm in enumerate(config.patterns)
        },
    }
    if config.score:
        settings = EvaluationConfig(
            bootstrap_samples=config.bootstrap_samples, seed=config.seed, batch_size=config.batch_size
        )
        dense, scores = score_patterns(
            engine, config.task, config.patterns, output, settings, resume=resume, console=console
        )
        results["dense"] = dense
        for arm, score in zip(config.patterns, scores, strict=True):
            results["patterns"][arm.label] |= score
    write_json(output / RESULTS_FILE, results)
    print_quality(results, console)
    return results


def _measured_prompts(
    engine: Engine, config: QualityConfig, output: Path, resume: bool, console: Console
) -> list[dict[str, Any]]:
    source = open_task(config.task)
    total = source.length or 0
    arms = [pattern_of(arm, engine.model) for arm in config.patterns]
    file = MeasuredRows(output / "prompts.jsonl", engine.fingerprint(), resume=resume)
    done = sum(str(index) in file for index in range(total))
    with counting("measuring prompts", total, done, console) as counter:
        for index in range(total):
            if str(index) in file:
                continue
            prompt = prompt_of(engine, as_prompt(source[index], config.task))
            mass = prompt_mass(engine.model, prompt, arms)
            dense = next_token_logits(engine.model, prompt, engine.suppressed_ids)
            tokens = [next_token(engine.model, prompt, dense, *arm, engine.suppressed_ids) for arm in arms]
            patterns = [
                {**asdict(token), "densities": _listed(found.density), "kept": _listed(found.kept)}
                for token, found in zip(tokens, mass.patterns, strict=True)
            ]
            row = {"id": prompt.id, "tokens": prompt.tokens, "layers": mass.layers}
            file.add(str(index), {**row, "attention": _listed(mass.attention), "patterns": patterns})
            counter.advance(1)
    return [file[str(index)] for index in range(total)]


def _listed(values: np.ndarray) -> list[Any]:
    return np.round(values.astype(np.float64), _DIGITS).tolist()


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}


def _attention(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of all attention in each modality pair, mean over prompts, layers and heads."""
    shares = np.mean([np.array(row["attention"]) for row in rows], axis=(0, 1, 2))  # (4,)
    return dict(zip(PAIRS, shares.tolist(), strict=True))


def summary_of(rows: Sequence[Mapping[str, Any]], number: int, config: QualityConfig) -> dict[str, Any]:
    """Pattern `number` over all prompts: KL, agreement, density; recovered mass whole, by pair, by layer and head."""
    own = [row["patterns"][number] for row in rows]
    attention = np.mean([np.array(row["attention"]) for row in rows], axis=0)  # (layers, H, 4)
    kept = np.mean([np.array(row["kept"]) for row in own], axis=0)  # (3, layers, H, 4)
    settings: dict[str, Any] = {"samples": config.bootstrap_samples, "seed": config.seed}
    divergences = [row["kl"] for row in own]
    kl = bootstrap(divergences, **settings)
    agreement = estimate([float(row["agrees"]) for row in own], is_binary=True, **settings)
    whole = kept.sum(axis=-1)  # (3, layers, H)
    totals = attention.sum(axis=(0, 1))  # (4,)
    pairs = {}
    for index, pair in enumerate(PAIRS):
        shares = kept[..., index].sum(axis=(1, 2)) / totals[index] if totals[index] > 0.0 else [None] * 3
        pairs[pair] = dict(zip(_KINDS, map(_plain, shares), strict=True))
    densities = np.mean([np.array(row["densities"]) for row in own], axis=0)  # (layers, Hkv)
    return {
        "density": float(np.mean([row["density"] for row in own])),
        "kl": {**kl.row(), "most": max(divergences)},
        "agreement": agreement.row(),
        "mass": dict(zip(_KINDS, whole.mean(axis=(1, 2)).tolist(), strict=True)),
        "pairs": pairs,
        "by_layer": {
            "density": densities.mean(axis=1).tolist(),
            **dict(zip(_KINDS, whole.mean(axis=2).tolist(), strict=True)),
        },
        "by_head": whole[0].tolist(),
        "by_head_and_pair": _share(kept[0], attention).tolist(),
    }


def _share(kept: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Kept over all, (layers, H, 4); 1 where there is nothing to keep."""
    return np.where(attention > 0.0, kept / np.where(attention > 0.0, attention, 1.0), 1.0)


def _plain(value: Any) -> float | None:
    return None if value is None else float(value)


def score_patterns(
    engine: Engine,
    task: TaskConfig,
    arms: Sequence[PatternArm],
    output: Path,
    settings: EvaluationConfig,
    *,
    resume: bool,
    console: Console,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer the task dense and under each pattern, on the same model: the dense figure, and for each pattern its
    figure, the paired difference from dense and both figures of each category."""
    options: dict[str, Any] = {
        "resume": resume, "batch_size": settings.batch_size, "config": settings, "console": console,
    }  # fmt: skip
    dense_folder = output / "predictions" / "dense"
    dense = evaluate(engine, task, dense_folder, **options)
    rows = []
    for number, arm in enumerate(arms):
        console.print(f"answering under {arm.label}", markup=False)
        sparse_engine = Engine(engine.model, engine.processor, device=str(engine.device), sparse=arm)
        folder = output / "predictions" / f"pattern-{number + 1}"
        try:
            result = evaluate(sparse_engine, task, folder, **options)
        finally:
            assert sparse_engine.sparse is not None
            sparse_engine.sparse.close()
        categories = {
            name: {"score": result.categories[name].row(), "dense": dense.categories[name].row()}
            for name in result.categories
        }
        difference = compare_folders(folder, dense_folder, task, settings).overall.to_dict()
        rows.append({"score": result.overall.row(), "difference": difference, "categories": categories})
    return dense.overall.row(), rows


def print_quality(results: Mapping[str, Any], console: Console) -> None:
    """The table on the terminal."""
    scored = "dense" in results
    table = Table(title=f"{results['task']}: {results['prompts']} prompts, against dense", title_justify="left")
    for name in ("pattern", "density", "KL", "top-1 agrees", "mass", "oracle", "random"):
        table.add_column(name, justify="left" if name == "pattern" else "right", overflow="fold")
    if scored:
        table.add_column("score minus dense", justify="right", no_wrap=True)
    for name, row in results["patterns"].items():
        cells = [name, f"{row['density']:.3f}", f"{row['kl']['value']:.4f}", f"{row['agreement']['value']:.3f}"]
        cells += [f"{row['mass'][kind]:.3f}" for kind in _KINDS]
        if scored:
            cells.append(str(Difference.read(row["difference"], Figure.read(row["score"]).metric)))
        table.add_row(*cells)
    console.print(table)
    pairs = Table(title="recovered attention by modality pair (query -> key)", title_justify="left")
    pairs.add_column("pattern", overflow="fold")
    shown = [pair for pair in PAIRS if results["attention"][pair] > 0.0]
    for pair in shown:
        pairs.add_column(f"{pair} ({results['attention'][pair]:.0%})", justify="right")
    for name, row in results["patterns"].items():
        pairs.add_row(name, *(f"{row['pairs'][pair]['pattern']:.3f}" for pair in shown))
    console.print(pairs)
    if scored:
        dense = Figure.read(results["dense"])
        console.print(f"dense {dense.metric.title}: {dense}", markup=False)
