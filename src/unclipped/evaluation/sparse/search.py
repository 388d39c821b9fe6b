"""Search of a pattern: for each layer the cheapest candidate that keeps attention and next token within a bound.

The prompts that choose are run dense once, and every candidate's recovered mass and density is measured in every layer
(and key head). For a threshold each place takes the cheapest candidate whose recovered mass reaches it; `full` always
does. So one number makes a combination, tightened until the mean KL of the next token, measured on the prompts that
verify, is within the bound: recovered mass alone does not bound it. The bound is one on the mean as measured; its
interval over prompts (bootstrap, 95 %) stands beside it, and a choice whose interval reaches beyond the bound says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from unclipped.attention.detect import key_heads_of
from unclipped.attention.parts import PerHead, PerLayer, check_lists
from unclipped.attention.pattern_file import PatternFile, write_pattern_file
from unclipped.attention.patterns import Full, Pattern
from unclipped.attention.prefill import decoder_of
from unclipped.attention.rulers import Ruler
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UnclippedError, UsageError
from unclipped.core.files import write_json
from unclipped.core.progress import counting
from unclipped.evaluation.config import EvaluationConfig
from unclipped.evaluation.figures import KL, Difference, Figure
from unclipped.evaluation.intervals import FEW_CLUSTERS, bootstrap
from unclipped.evaluation.questions import as_prompt, open_task
from unclipped.evaluation.runner import default_console
from unclipped.evaluation.sparse.combinations import Combination, Measured, combine, of_combination, pattern_for
from unclipped.evaluation.sparse.config import PatternArm, SearchConfig
from unclipped.evaluation.sparse.measures import Blocks, next_token, next_token_logits, prompt_mass, prompt_of
from unclipped.evaluation.sparse.quality import score_patterns
from unclipped.evaluation.sparse.rows import MeasuredRows
from unclipped.inference.engine import Engine

PATTERN_FILE = "pattern.yaml"
RESULTS_FILE = "results.json"
_REACHED = ("kl", "kl_low", "kl_high", "agreement", "mass")
_THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)


class SearchFailed(UnclippedError):
    """No combination is within the bounds; the message says what was reached."""


def search_pattern(
    config: SearchConfig, output: str | Path, *, resume: bool = False, device: str = "auto", console: Any = None
) -> dict[str, Any]:
    """Search and write OUTPUT/pattern.yaml and OUTPUT/results.json.

    Measured prompts stand in OUTPUT/masses.jsonl and OUTPUT/tokens.jsonl as they are done. Raises SearchFailed, which
    says what was reached, when no combination but dense is within the bounds; results.json is written all the same.
    """
    run = _Search(config, Path(output), resume, device, console or default_console())
    return run.run()


class _Search:
    """One run: the engine, the prompts, and what has been measured."""

    def __init__(self, config: SearchConfig, output: Path, resume: bool, device: str, console: Console) -> None:
        self.config, self.output, self.resume, self.console = config, output, resume, console
        self.engine = Engine(config.model, device=device)
        decoder = decoder_of(self.engine.model)
        self.depth = int(decoder.config.num_hidden_layers)
        self.candidates = read_candidates(config.candidates)
        for candidate in self.candidates:
            check_lists(candidate, layers=self.depth, key_heads=key_heads_of(decoder.config))
        self.source = open_task(config.task)
        total = self.source.length or 0
        if total < 2:
            raise UsageError(
                f"search: {self.source.name} has {total} prompt; 2 are needed, one to choose, one to verify"
            )
        self.choosing, self.verifying = list(range(0, total, 2)), list(range(1, total, 2))
        identity = self.engine.fingerprint()
        self.masses = MeasuredRows(output / "masses.jsonl", identity, resume=resume)
        self.tokens = MeasuredRows(output / "tokens.jsonl", identity, resume=resume)
        self.points: dict[tuple[tuple[int, ...], ...], dict[str, Any]] = {}
        self.dense: dict[int, Any] = {}

    @property
    def blocks(self) -> Blocks:
        return self.config.key_block, self.config.query_block

    def prompt(self, index: int) -> Any:
        return prompt_of(self.engine, as_prompt(self.source[index], self.config.task))

    def run(self) -> dict[str, Any]:
        measured = self.measure_masses()
        alone = [self.alone(measured, number) for number in range(len(self.candidates))]
        floor = self.config.mass
        thresholds = sorted({max(threshold, floor) for threshold in (floor, *_THRESHOLDS)})
        points = [self.point(measured, threshold) for threshold in thresholds]
        points = self.refined(measured, points)
        found = [*points, *self.uniform(measured, alone)]
        good = [point for point in found if self.holds(point)]
        best = min(good, key=lambda point: (point["density"], point["kl"])) if good else None
        frontier = sorted(
            {str(point["choice"]): point for point in points}.values(), key=lambda point: point["density"]
        )
        if self.config.rulers:
            for point in frontier:
                self.add_rulers(measured, point)
        dense = self.add_scores(frontier) if self.config.score else None
        results = self.results(measured, frontier, alone, best) | ({} if dense is None else {"dense": dense})
        write_json(self.output / RESULTS_FILE, results)
        print_search(results, self.console)
        if best is None:
            raise SearchFailed(self.failure(found))
        self.write(results)
        return results

    def measure_masses(self) -> Measured:
        """Recovered mass of every candidate on the prompts that choose."""
        done = sum(str(index) in self.masses for index in self.choosing)
        arms = [(candidate, self.blocks) for candidate in self.candidates]
        with counting("attention of prompts", len(self.choosing), done, self.console) as counter:
            for index in self.choosing:
                if str(index) in self.masses:
                    continue
                found = prompt_mass(self.engine.model, self.prompt(index), arms)
                density = np.stack([own.density for own in found.patterns])  # (candidates, layers, Hkv)
                kept = np.stack([own.kept.sum(axis=-1) for own in found.patterns])  # (candidates, 3, layers, H)
                kept = kept.reshape(*kept.shape[:3], density.shape[2], -1).mean(axis=-1)  # group means
                row = {"layers": found.layers, "density": density.round(7).tolist()}
                self.masses.add(str(index), {**row, "kept": kept.astype(np.float64).round(7).tolist()})
                counter.advance(1)
        rows = [self.masses[str(index)] for index in self.choosing]
        kept = np.mean([np.array(row["kept"]) for row in rows], axis=0)  # (candidates, 3, layers, Hkv)
        density = np.mean([np.array(row["density"]) for row in rows], axis=0)
        return Measured(
            self.candidates, tuple(rows[0]["layers"]), kept[:, 0], kept[:, 1], kept[:, 2], density
        )  # fmt: skip

    def verify(self, pattern: Pattern, name: str) -> dict[str, float]:
        """Mean KL with its interval, agreement and density of a pattern on the prompts that verify."""
        rows = []
        done = sum(f"{index} {name}" in self.tokens for index in self.verifying)
        shown = name if len(name) <= 48 else f"{name[:45]}…"
        with counting(f"next token, {shown}", len(self.verifying), done, self.console) as counter:
            for index in self.verifying:
                key = f"{index} {name}"
                if key not in self.tokens:
                    prompt, model, never = self.prompt(index), self.engine.model, self.engine.suppressed_ids
                    if index not in self.dense:
                        self.dense[index] = next_token_logits(model, prompt, never)
                    found = next_token(model, prompt, self.dense[index], pattern, self.blocks, never)
                    self.tokens.add(key, asdict(found))
                    counter.advance(1)
                rows.append(self.tokens[key])
        kl = bootstrap([row["kl"] for row in rows], seed=self.config.seed)
        agreement, density = (float(np.mean([row[name] for row in rows])) for name in ("agrees", "density"))
        return {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "agreement": agreement, "density": density}

    def alone(self, measured: Measured, number: int) -> dict[str, Any]:
        """A candidate in all layers."""
        pattern = self.candidates[number]
        return {
            "pattern": str(pattern),
            **self.verify(pattern, str(pattern)),
            "mass": float(measured.mass[number].mean()),
        }

    def point(self, measured: Measured, threshold: float) -> dict[str, Any]:
        """The combination of a threshold, verified; equal combinations are measured once."""
        combination = combine(measured, threshold, per_head=self.config.per_head)
        if combination.choice not in self.points:
            pattern = pattern_for(combination, measured, self.depth)
            self.points[combination.choice] = {
                "least_mass": threshold,
                "pattern": str(pattern),
                "choice": combination.choice,
                "mass": float(of_combination(measured.mass, combination).mean()),
                "least_mass_of_layer": float(of_combination(measured.mass, combination).mean(axis=1).min()),
                **self.verify(pattern, str(pattern)),
            }
        return self.points[combination.choice]

    def uniform(self, measured: Measured, alone: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The candidates alone as combinations: one of them may be cheaper than what thresholds lead to."""
        points = []
        for number, row in enumerate(alone):
            least = float(measured.mass[number].mean(axis=1).min())
            choice = ((number,),) * len(measured.layers)
            points.append({**row, "choice": choice, "least_mass": least, "least_mass_of_layer": least})
        return points

    def refined(self, measured: Measured, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Halve the interval between the loosest threshold from which on KL holds and the one before it."""
        for _ in range(self.config.steps):
            ordered = sorted({point["least_mass"]: point for point in points}.values(), key=lambda p: p["least_mass"])
            edge = next(
                (pair for pair in reversed(list(pairwise(ordered))) if not self.keeps(pair[0]) and self.keeps(pair[1])),
                None,
            )
            if edge is None:
                break
            middle = self.point(measured, (edge[0]["least_mass"] + edge[1]["least_mass"]) / 2)
            if any(middle is point for point in points):
                break
            points = [*points, middle]
        return points

    def keeps(self, point: Mapping[str, Any]) -> bool:
        """Whether the next token and the attention stay within their bounds."""
        return point["kl"] <= self.config.kl and point["least_mass_of_layer"] >= self.config.mass - 1e-6

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether all bounds hold and anything is saved."""
        is_dense = all(isinstance(self.candidates[number], Full) for row in point["choice"] for number in row)
        return self.keeps(point) and point["density"] <= self.config.density and not is_dense

    def add_rulers(self, measured: Measured, point: dict[str, Any]) -> None:
        """Oracle and random selection of as many blocks as the combination has."""
        combination = Combination(point["least_mass"], point["choice"])
        pattern = pattern_for(combination, measured, self.depth)
        rulers: dict[Literal["oracle", "random"], np.ndarray] = {"oracle": measured.oracle, "random": measured.random}
        for kind, masses in rulers.items():
            ruler = Ruler(pattern, kind, seed=self.config.seed if kind == "random" else 0)
            name = f"{ruler} (seed {self.config.seed})" if kind == "random" else str(ruler)
            mass = float(of_combination(masses, combination).mean())
            point[kind] = {**self.verify(ruler, name), "mass": mass}

    def add_scores(self, frontier: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The task's score at every point, on all prompts, and the paired difference from dense; -> the dense score."""
        config = self.config
        arms = [
            PatternArm(pattern=point["pattern"], key_block=config.key_block, query_block=config.query_block)
            for point in frontier
        ]
        settings = EvaluationConfig(seed=config.seed, batch_size=config.batch_size)
        dense, scores = score_patterns(
            self.engine, config.task, arms, self.output, settings, resume=self.resume, console=self.console
        )
        for point, score in zip(frontier, scores, strict=True):
            point |= {name: score[name] for name in ("score", "difference")}
        return dense

    def results(
        self,
        measured: Measured,
        frontier: list[dict[str, Any]],
        alone: list[dict[str, Any]],
        best: dict[str, Any] | None,
    ) -> dict[str, Any]:
        config = self.config
        chosen = None
        if best is not None:
            combination = Combination(best["least_mass"], best["choice"])
            chosen = {
                **{name: best[name] for name in ("pattern", "density", *_REACHED, "least_mass")},
                "places": self.places(measured, combination),
            }
        return {
            "model": config.model,
            "task": config.task.name,
            "prompts": {"choose": len(self.choosing), "verify": len(self.verifying)},
            "bounds": {"kl": config.kl, "mass": config.mass, "density": config.density},
            "blocks": {"key_block": config.key_block, "query_block": config.query_block},
            "chosen": chosen,
            "frontier": [{key: value for key, value in point.items() if key != "choice"} for point in frontier],
            "candidates": alone,
        }

    def places(self, measured: Measured, combination: Combination) -> list[dict[str, Any]]:
        mass, density = (of_combination(values, combination) for values in (measured.mass, measured.density))
        rows = []
        for place, (layer, row) in enumerate(zip(measured.layers, combination.choice, strict=True)):
            for head, number in enumerate(row):
                heads = slice(None) if len(row) == 1 else slice(head, head + 1)
                name = f"layer {layer}" if len(row) == 1 else f"layer {layer}, key head {head}"
                rows.append(
                    {"place": name, "pattern": str(measured.patterns[number]),
                     "mass": float(mass[place, heads].mean()), "density": float(density[place, heads].mean())}
                )  # fmt: skip
        return rows

    def failure(self, found: Sequence[Mapping[str, Any]]) -> str:
        """What was asked and what was reached."""
        config = self.config
        within = [point for point in found if point["density"] <= config.density]
        keeping = [point for point in found if self.keeps(point)]
        asked = f"KL at most {config.kl:g}"
        asked += f", mass at least {config.mass:g}" if config.mass else ""
        asked += f", density at most {config.density:g}" if config.density < 1.0 else ""
        reached = []
        if within:
            best = min(within, key=lambda point: point["kl"])
            reached.append(f"within the density KL {best['kl']:.4f} was reached (density {best['density']:.3f})")
        if keeping:
            best = min(keeping, key=lambda point: point["density"])
            reached.append(f"within the other bounds density {best['density']:.3f} was reached (KL {best['kl']:.4f})")
        return (
            f"search: no combination of {len(self.candidates)} candidates has {asked}; "
            f"{'; '.join(reached) or 'nothing was within any bound'}; loosen a bound, or add a --candidate "
            f"(all points stand in {self.output / RESULTS_FILE})"
        )

    def write(self, results: Mapping[str, Any]) -> None:
        chosen = results["chosen"]
        found = {name: chosen[name] for name in ("density", *_REACHED)}
        contents = PatternFile(
            pattern=chosen["pattern"],
            key_block=self.config.key_block,
            query_block=self.config.query_block,
            chosen={
                "model": self.config.model,
                "data": self.config.task.source.source,
                "split": self.config.task.source.split,
                "prompts": results["prompts"],
                "bounds": results["bounds"],
                "reached": {name: round(value, 6) for name, value in found.items()},
            },
        )
        write_pattern_file(self.output / PATTERN_FILE, contents)
        self.console.print(f"wrote {self.output / PATTERN_FILE}", markup=False)


def read_candidates(texts: Sequence[str]) -> tuple[Pattern, ...]:
    """The candidates, `full` behind them. Raises UsageError for what is no pattern, or a list of them."""
    candidates = [parse_pattern(text) for text in texts]
    for candidate in candidates:
        if any(isinstance(inner, (PerLayer, PerHead)) for inner in candidate.walk()):
            raise UsageError(f"candidate {candidate}: the search makes the lists itself; give their entries one by one")
    return tuple(dict.fromkeys([*(c for c in candidates if not isinstance(c, Full)), Full()]))


def print_search(results: Mapping[str, Any], console: Console) -> None:
    """The frontier and the choice on the terminal."""
    frontier = results["frontier"]
    has_rulers = bool(frontier) and "random" in frontier[0]
    table = Table(title="frontier: the cheapest candidates that keep so much attention", title_justify="left")
    names = ["least mass", "density", "KL [95 %]", "top-1 agrees", "mass"]
    names += ["oracle KL", "random KL", "oracle mass", "random mass"] if has_rulers else []
    names += ["score minus dense"] if "dense" in results else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=name in ("KL [95 %]", "score minus dense"))
    for point in frontier:
        cells = [f"{point['least_mass']:.4g}", f"{point['density']:.3f}", kl_interval(point)]
        cells += [f"{point['agreement']:.3f}", f"{point['mass']:.3f}"]
        if has_rulers:
            cells += [f"{point[kind]['kl']:.4f}" for kind in ("oracle", "random")]
            cells += [f"{point[kind]['mass']:.3f}" for kind in ("oracle", "random")]
        if "dense" in results:
            cells.append(str(Difference.read(point["difference"], Figure.read(point["score"]).metric)))
        table.add_row(*cells)
    console.print(table)
    chosen = results["chosen"]
    if chosen is not None:
        console.print(
            f"chosen: density {chosen['density']:.3f}, KL {kl_interval(chosen)} (bound {results['bounds']['kl']:g}), "
            f"recovered mass {chosen['mass']:.3f}\n{chosen['pattern']}",
            markup=False,
        )
        doubt = doubt_of(results)
        if doubt:
            console.print(doubt, markup=False)


def kl_interval(row: Mapping[str, float]) -> str:
    """The mean KL with its interval over prompts, as shown in tables."""
    return str(Figure(row["kl"], row["kl_low"], row["kl_high"], 0, KL))


def doubt_of(results: Mapping[str, Any]) -> str:
    """What to say when the prompts that verified are too few to show that the chosen pattern keeps its bound."""
    chosen, bound, prompts = results["chosen"], results["bounds"]["kl"], results["prompts"]["verify"]
    if chosen["kl_high"] > bound:
        return (
            f"{prompts} prompts do not show that the bound holds: the interval of the KL reaches "
            f"{chosen['kl_high']:.4f}. More prompts (--limit) would tell; a tighter bound is safer."
        )
    if prompts < FEW_CLUSTERS:
        return f"Only {prompts} prompts verify: below {FEW_CLUSTERS} the interval of the KL is itself uncertain."
    return ""
