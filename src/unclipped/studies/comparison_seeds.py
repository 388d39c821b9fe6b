"""A comparison of objectives run with several seeds: each a whole comparison, and one page over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unclipped.core.files import write_json
from unclipped.evaluation.figures import Figure
from unclipped.studies.comparison import RESULTS, run_comparison
from unclipped.studies.comparison_config import ComparisonConfig


def run_seeds(
    config: ComparisonConfig,
    output: str | Path,
    *,
    resume: bool = False,
    title: str = "Pretraining objectives compared",
    recipe_text: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run `config` with each of its seeds in `output/seed-N`; write comparison.json and report.html over all of them.

    Without seeds it is one comparison in `output`. Returns the results (see `over_seeds`). Raises as `run_comparison`.
    """
    if not config.seeds:
        return run_comparison(config, output, resume=resume, title=title, recipe_text=recipe_text, say=say)
    from unclipped.studies.comparison_report import write_comparison_report

    found: dict[int, dict[str, Any]] = {}
    for number, seed in enumerate(config.seeds, start=1):
        say(f"\n=== seed {seed} ({number} of {len(config.seeds)}) ===")
        found[seed] = run_comparison(
            config.with_seed(seed),
            Path(output) / folder_of(seed),
            resume=resume,
            title=f"{title}: seed {seed}",
            say=say,
        )
    results = over_seeds(found)
    write_json(Path(output) / RESULTS, results)
    write_comparison_report(
        Path(output) / "report.html", results, title=title, description=config.description, recipe_text=recipe_text
    )
    return results


def folder_of(seed: int) -> str:
    """Folder of one seed's comparison, inside that of all."""
    return f"seed-{seed}"


def over_seeds(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The results of several seeds in the form of one, with `seeds` beside them.

    Of every figure the mean over seeds, with the lowest and the highest seed as `low` and `high`. A difference also
    says in how many seeds its paired interval lies above zero (`above`).
    """
    runs = list(found.values())
    first = runs[0]
    return {
        "seeds": list(found),
        "pretraining": {arm: _pretraining(found, arm) for arm in first["pretraining"]},
        "probes": {
            probe: {arm: _probe([run["probes"][probe][arm] for run in runs]) for arm in arms}
            for probe, arms in first["probes"].items()
        },
        **{
            key: {
                outer: {inner: _figure([run[key][outer][inner] for run in runs]) for inner in rows}
                for outer, rows in first[key].items()
            }
            for key in ("vlm", "vlm_overall")
        },
        **{
            key: {
                arm: {task: _difference([run[key][arm][task] for run in runs]) for task in tasks}
                for arm, tasks in first[key].items()
            }
            for key in ("vlm_minus_random", "vlm_minus_blind")
        },
    }


def _pretraining(found: Mapping[int, Mapping[str, Any]], arm: str) -> dict[str, Any]:
    """The first seed's row, with the seconds, reports and warnings of all."""
    rows = {seed: run["pretraining"][arm] for seed, run in found.items()}
    return next(iter(rows.values())) | {
        "seconds": sum(row["seconds"] for row in rows.values()),
        "reports": {seed: f"{folder_of(seed)}/{row['report']}" for seed, row in rows.items()},
        "warnings": [f"seed {seed}: {warning}" for seed, row in rows.items() for warning in row["warnings"]],
    }


def _probe(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    compared = [name for name in rows[0] if name not in ("metric", "minus_random")]
    return {
        "metric": rows[0]["metric"],
        **{name: _figure([row[name] for row in rows]) for name in compared},
        "minus_random": _difference([row["minus_random"] for row in rows]),
    }


def _figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    name = Figure.read(rows[0]).metric.name
    return _spread(rows, name) | {"count": rows[0]["count"]}


def _difference(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    there = [row for row in rows if row is not None]
    if not there:
        return None
    return _spread(there, "value") | {"above": sum(row["low"] > 0 for row in there), "of": len(there)}


def _spread(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    values = [row[name] for row in rows]
    return {name: sum(values) / len(values), "low": min(values), "high": max(values), "values": values}
