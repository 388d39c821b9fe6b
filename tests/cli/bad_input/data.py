"""Mistakes of `unclipped data stats`."""

from __future__ import annotations

from bad_input.row import Arguments, Row


def stats(*more: str) -> Arguments:
    return lambda place: ["data", "stats", place.data(), *more, "--output", "out"]


ROWS: dict[str, Row] = {
    "stats of nothing": Row(lambda p: ["data", "stats", "nowhere", "--output", "out"], 1, ("nowhere", "no such file")),
    "stats of an unknown task": Row(
        lambda p: ["data", "stats", "generated:shaps", "--output", "out"], 2, ("shaps", "did you mean 'shapes'")
    ),
    "stats, unknown field": Row(stats("formt=images"), 2, ("'sources.0.formt'", "did you mean 'format'")),
    "stats, unknown filter": Row(stats("--filter", "textrich"), 2, ("textrich", "text_rich")),
    "stats, threshold and no filter": Row(stats("--threshold", "0.5"), 2, ("--threshold", "--filter")),
    "stats, share of nothing": Row(stats("--filter", "text_rich", "--share", "0"), 2, ("share", "greater than 0")),
    "stats, share and threshold": Row(
        stats("--filter", "text_rich", "--share", "0.5", "--threshold", "0.5"), 2, ("leave one out",)
    ),
    "stats, limit of nothing": Row(stats("--limit", "0"), 2, ("--limit", "equal to 1")),
    "stats of a recipe without data": Row(
        lambda p: ["data", "stats", "clothing-objectives", "--output", "out"],
        2,
        ("clothing-objectives", "no section data"),
    ),
    "stats of a recipe, split": Row(
        lambda p: ["data", "stats", p.recipe(), "--split", "val", "--output", "out"], 2, ("--split", "data.sources.0")
    ),
    "stats, split that is not there": Row(stats("--split", "test"), 1, ("no test.jsonl", "train, val")),
}
