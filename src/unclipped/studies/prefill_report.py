"""Pages about sparse prefill: the quality of patterns, and the frontier of a search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclipped.core.files import write_text
from unclipped.evaluation.sparse.search import doubt_of, kl_interval
from unclipped.studies.environment import environment
from unclipped.studies.prefill_plots import both, frontier_plot, heads_plot, standalone
from unclipped.studies.report import write_sections

_KINDS = {"pattern": "the pattern", "oracle": "oracle, as many blocks", "random": "random, as many blocks"}


def write_quality_report(path: Path, results: Mapping[str, Any]) -> Path:
    """Write the page about `prefill quality`'s results. Raises UnclippedError when it cannot be written."""
    scored = "dense" in results
    patterns = results["patterns"]
    head = ["pattern", "density", "KL of the next token [95 %]", "top-1 agrees [95 %]", "mass", "oracle", "random"]
    if scored:
        head += [f"{results['dense']['metric'].replace('_', ' ')} [95 %]", "minus dense, paired"]
    sections = [
        {
            "title": "Against dense",
            "text": "Mass is the share of attention that falls on attended keys, mean over layers, heads and prompts. "
            "Oracle and random choose as many blocks for every query block: by true attention, and at random.",
            "figures": _quality_figures(patterns, scored),
            "head": head,
            "rows": [
                _quality_row(f"{number} {name}", row, scored)
                for number, (name, row) in enumerate(patterns.items(), start=1)
            ],
        },
        {
            "title": "By modality of query and key",
            "text": "The share of the attention of each pair that the pattern keeps; in the first row the share of all "
            "attention that is the pair's.",
            "figures": [],
            "head": ["pattern", *results["attention"]],
            "rows": [
                ["all attention", *(f"{share:.3f}" for share in results["attention"].values())],
                *(
                    [name, *(_share(pair["pattern"]) for pair in row["pairs"].values())]
                    for name, row in patterns.items()
                ),
            ],
        },
    ]
    for name, row in patterns.items():
        layers = row["by_layer"]
        sections.append(
            {
                "title": f"Layers and heads: {name}",
                "text": "Recovered mass; full ink is all of it.",
                "figures": [both(heads_plot, row["by_head"], name)],
                "head": ["layer", "density", *_KINDS.values()],
                "rows": [
                    [
                        str(layer),
                        f"{layers['density'][place]:.3f}",
                        *(f"{layers[kind][place]:.3f}" for kind in _KINDS),
                    ]
                    for place, layer in enumerate(results["layers"])
                ],
            }
        )
        if "categories" in row and len(row["categories"]) > 1:
            sections.append(
                {
                    "title": f"Categories: {name}",
                    "text": "",
                    "figures": [],
                    "head": ["category", "items", "dense [95 %]", "sparse [95 %]"],
                    "rows": [
                        [category, f"{found['score']['count']:,}", _interval(found["dense"]), _interval(found["score"])]
                        for category, found in row["categories"].items()
                    ],
                }
            )
    tokens = results["tokens"]
    lead = (
        f"{results['prompts']:,} prompts of {results['task']} to {results['model']}, {tokens['least']:,} to "
        f"{tokens['most']:,} tokens."
    )
    return write_sections(path, "Quality of sparse prefill", lead, sections, environment())


def _quality_row(name: str, row: Mapping[str, Any], scored: bool) -> list[str]:
    cells = [name, f"{row['density']:.3f}", _interval(row["kl"], 4), _interval(row["agreement"])]
    cells += [f"{row['mass'][kind]:.3f}" for kind in _KINDS]
    return cells + ([_interval(row["score"]), _difference(row["difference"])] if scored else [])


def _quality_figures(patterns: Mapping[str, Any], scored: bool) -> list[dict[str, str]]:
    def points(of: Any) -> dict[str, list[tuple[float, float]]]:
        return {str(number): [(row["density"], of(row))] for number, row in enumerate(patterns.values(), start=1)}

    figures = [both(frontier_plot, {}, "KL (nats)", points=points(lambda row: row["kl"]["value"]))]
    if scored:
        figures.append(both(frontier_plot, {}, "score", points=points(lambda row: row["score"]["value"])))
    return figures


def write_search_report(output: Path, results: Mapping[str, Any]) -> Path:
    """Write frontier.svg, mass.svg and report.html of a search; -> the page."""
    frontier, bounds = results["frontier"], results["bounds"]
    curves = {"searched": [(row["density"], row["kl"]) for row in frontier]}
    masses = {"searched": [(row["density"], row["mass"]) for row in frontier]}
    for kind in ("oracle", "random"):
        if frontier and kind in frontier[0]:
            curves[kind] = [(row[kind]["density"], row[kind]["kl"]) for row in frontier]
            masses[kind] = [(row["density"], row[kind]["mass"]) for row in frontier]
    numbered = [(str(number), row) for number, row in enumerate(results["candidates"], start=1)]
    alone = {number: [(row["density"], row["kl"])] for number, row in numbered}
    alone_mass = {number: [(row["density"], row["mass"])] for number, row in numbered}
    options: dict[str, Any] = {"points": alone, "bound": bounds["kl"], "logarithmic": True}
    kl = both(frontier_plot, curves, "KL of the next token (nats)", **options)
    mass = both(frontier_plot, masses, "recovered mass", points=alone_mass)
    write_text(output / "frontier.svg", standalone(kl["wide"]))
    write_text(output / "mass.svg", standalone(mass["wide"]))
    figures = [kl, mass]
    scored = "dense" in results
    if scored:
        scores = {"searched": [(row["density"], row["score"]["value"]) for row in frontier]}
        metric = results["dense"]["metric"].replace("_", " ")
        figures.append(both(frontier_plot, scores, metric, bound=results["dense"]["value"]))
        write_text(output / "score.svg", standalone(figures[-1]["wide"]))
    has_rulers = bool(frontier) and "random" in frontier[0]
    head = ["combination", "density", "KL [95 %]", "top-1 agrees", "mass"]
    head += ["oracle KL", "random KL", "oracle mass", "random mass"] if has_rulers else []
    head += ["score [95 %]", "minus dense, paired"] if scored else []
    chosen = results["chosen"]
    sections = [
        {
            "title": "Frontier",
            "text": "Each combination takes in every place the cheapest candidate that keeps at least so much of its "
            "attention. The dotted line is the bound; diamonds are candidates alone, in all layers, by number.",
            "figures": figures,
            "head": head,
            "rows": [_frontier_row(row, has_rulers) for row in frontier],
        },
        {
            "title": "Candidates alone",
            "text": "",
            "figures": [],
            "head": ["candidate", "density", "KL [95 %]", "top-1 agrees", "mass"],
            "rows": [
                [
                    f"{number} {row['pattern']}",
                    f"{row['density']:.3f}",
                    kl_interval(row),
                    f"{row['agreement']:.3f}",
                    f"{row['mass']:.3f}",
                ]
                for number, row in numbered
            ],
        },
        {
            "title": "Chosen",
            "text": f"{chosen['pattern']}",
            "figures": [],
            "head": ["place", "pattern", "recovered mass", "density"],
            "rows": [
                [row["place"], row["pattern"], f"{row['mass']:.3f}", f"{row['density']:.3f}"]
                for row in chosen["places"]
            ],
        },
    ]
    lead = (
        f"{results['model']}, {results['prompts']['choose']} prompts of {results['task']} chose and "
        f"{results['prompts']['verify']} verified: density {chosen['density']:.3f}, KL {kl_interval(chosen)} "
        f"(bound {bounds['kl']:g}). {doubt_of(results)}"
    )
    return write_sections(output / "report.html", "Search of a sparse prefill", lead, sections, environment())


def _frontier_row(row: Mapping[str, Any], has_rulers: bool) -> list[str]:
    cells = [
        f"at least {row['least_mass']:.4g}",
        f"{row['density']:.3f}",
        kl_interval(row),
        f"{row['agreement']:.3f}",
    ]
    cells.append(f"{row['mass']:.3f}")
    if has_rulers:
        cells += [f"{row[kind]['kl']:.4f}" for kind in ("oracle", "random")]
        cells += [f"{row[kind]['mass']:.3f}" for kind in ("oracle", "random")]
    return cells + ([_interval(row["score"]), _difference(row["difference"])] if "score" in row else [])


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(row: Mapping[str, float], digits: int = 3) -> str:
    return f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _difference(row: Mapping[str, float]) -> str:
    value, low, high = (f"{row[key]:+.3f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
