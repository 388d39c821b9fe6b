"""Pages about sparse prefill: the quality of patterns, and the frontier of a search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclipped.core.files import write_text
from unclipped.evaluation.figures import KL, Difference, Figure
from unclipped.evaluation.sparse.search import doubt_of, kl_interval
from unclipped.studies.environment import environment
from unclipped.studies.page import Plot, Section, Table, Text, write_page
from unclipped.studies.plots import both
from unclipped.studies.prefill_plots import frontier_plot, heads_plot, standalone

_KINDS = {"pattern": "the pattern", "oracle": "oracle, as many blocks", "random": "random, as many blocks"}


def write_quality_report(path: Path, results: Mapping[str, Any]) -> Path:
    """Write the page about `prefill quality`'s results. Raises UnclippedError when it cannot be written."""
    scored = "dense" in results
    patterns = results["patterns"]
    head = ["pattern", "density", "KL of the next token [95 %]", "top-1 agrees [95 %]", "mass", "oracle", "random"]
    head += [f"{Figure.read(results['dense']).metric.title} [95 %]", "minus dense, paired"] if scored else []
    numbered = {f"{number} {name}": row for number, (name, row) in enumerate(patterns.items(), start=1)}
    shares = ["all attention", *(f"{share:.3f}" for share in results["attention"].values())]
    kept = [[name, *(_share(pair["pattern"]) for pair in row["pairs"].values())] for name, row in patterns.items()]
    sections = [
        Section(
            "Against dense",
            [
                Text(
                    "Mass is the share of attention that falls on attended keys, mean over layers, heads and prompts. "
                    "Oracle and random choose as many blocks for every query block: by true attention, and at random."
                ),
                *_quality_figures(patterns, scored),
                Table(head, [_quality_row(name, row, scored) for name, row in numbered.items()]),
            ],
        ),
        Section(
            "By modality of query and key",
            [
                Text(
                    "The share of the attention of each pair that the pattern keeps; in the first row the share of all "
                    "attention that is the pair's."
                ),
                Table(["pattern", *results["attention"]], [shares, *kept]),
            ],
        ),
    ]
    for name, row in patterns.items():
        layers = [row["by_layer"][kind] for kind in ("density", *_KINDS)]
        rows = [
            [str(layer), *(f"{values[place]:.3f}" for values in layers)]
            for place, layer in enumerate(results["layers"])
        ]
        text, plot = Text("Recovered mass; full ink is all of it."), both(heads_plot, row["by_head"], name)
        table = Table(["layer", "density", *_KINDS.values()], rows)
        sections.append(Section(f"Layers and heads: {name}", [text, plot, table]))
        if len(categories := row.get("categories", {})) > 1:
            pairs = {
                kind: (Figure.read(found["dense"]), Figure.read(found["score"])) for kind, found in categories.items()
            }
            cells = [[kind, f"{sparse.count:,}", str(dense), str(sparse)] for kind, (dense, sparse) in pairs.items()]
            table = Table(["category", "items", "dense [95 %]", "sparse [95 %]"], cells)
            sections.append(Section(f"Categories: {name}", [table]))
    tokens = results["tokens"]
    lead = (
        f"{results['prompts']:,} prompts of {results['task']} to {results['model']}, {tokens['least']:,} to "
        f"{tokens['most']:,} tokens."
    )
    return write_page(path, "Quality of sparse prefill", lead, sections, environment=environment())


def _quality_row(name: str, row: Mapping[str, Any], scored: bool) -> list[str]:
    cells = [name, f"{row['density']:.3f}", str(Figure.read(row["kl"], KL)), str(Figure.read(row["agreement"]))]
    cells += [f"{row['mass'][kind]:.3f}" for kind in _KINDS]
    return cells + (_scores(row) if scored else [])


def _scores(row: Mapping[str, Any]) -> list[str]:
    """The task's figure, and its difference from dense."""
    score = Figure.read(row["score"])
    return [str(score), str(Difference.read(row["difference"], score.metric))]


def _quality_figures(patterns: Mapping[str, Any], scored: bool) -> list[Plot]:
    def points(of: Any) -> dict[str, list[tuple[float, float]]]:
        return {str(number): [(row["density"], of(row))] for number, row in enumerate(patterns.values(), start=1)}

    figures = [both(frontier_plot, {}, "KL (nats)", points=points(lambda row: row["kl"]["value"]))]
    if scored:
        figures.append(both(frontier_plot, {}, "score", points=points(lambda row: Figure.read(row["score"]).value)))
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
    write_text(output / "frontier.svg", standalone(kl.wide))
    write_text(output / "mass.svg", standalone(mass.wide))
    figures = [kl, mass]
    scored = "dense" in results
    if scored:
        scores = {"searched": [(row["density"], Figure.read(row["score"]).value) for row in frontier]}
        dense = Figure.read(results["dense"])
        figures.append(both(frontier_plot, scores, dense.metric.title, bound=dense.value))
        write_text(output / "score.svg", standalone(figures[-1].wide))
    has_rulers = bool(frontier) and "random" in frontier[0]
    head = ["combination", "density", "KL [95 %]", "top-1 agrees", "mass"]
    head += ["oracle KL", "random KL", "oracle mass", "random mass"] if has_rulers else []
    head += ["score [95 %]", "minus dense, paired"] if scored else []
    chosen = results["chosen"]
    alone_rows = [
        [f"{number} {row['pattern']}", f"{row['density']:.3f}", kl_interval(row),
         *(f"{row[name]:.3f}" for name in ("agreement", "mass"))]
        for number, row in numbered
    ]  # fmt: skip
    places = [[row["place"], row["pattern"], f"{row['mass']:.3f}", f"{row['density']:.3f}"] for row in chosen["places"]]
    text = (
        "Each combination takes in every place the cheapest candidate that keeps at least so much of its attention. "
        "The dotted line is the bound; diamonds are candidates alone, in all layers, by number."
    )
    sections = [
        Section("Frontier", [Text(text), *figures, Table(head, [_frontier_row(row, has_rulers) for row in frontier])]),
        Section("Candidates alone", [Table(["candidate", "density", "KL [95 %]", "top-1 agrees", "mass"], alone_rows)]),
        Section(
            "Chosen",
            [Text(str(chosen["pattern"])), Table(["place", "pattern", "recovered mass", "density"], places)],
        ),
    ]
    lead = (
        f"{results['model']}, {results['prompts']['choose']} prompts of {results['task']} chose and "
        f"{results['prompts']['verify']} verified: density {chosen['density']:.3f}, KL {kl_interval(chosen)} "
        f"(bound {bounds['kl']:g}). {doubt_of(results)}"
    )
    return write_page(output / "report.html", "Search of a sparse prefill", lead, sections, environment=environment())


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
    return cells + (_scores(row) if "score" in row else [])


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
