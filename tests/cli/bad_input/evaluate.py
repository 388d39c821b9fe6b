"""Mistakes of `unclipped eval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bad_input.row import BAD, Arguments, Row, cut_image, sample
from bad_input_support import Place


def evaluate(*rows: Any, more: tuple[str, ...] = ()) -> Arguments:
    return lambda place: ["eval", place.models.vlm, "--data", place.data(*rows), "--output", "out", *more]


def evaluate_with(prepare: Callable[[Place], Any], *rows: Any) -> Arguments:
    def arguments(place: Place) -> list[Any]:
        data = place.data(*rows)
        prepare(place)
        return ["eval", place.models.vlm, "--data", data, "--output", "out"]

    return arguments


def rescore(*more: str) -> Arguments:
    return lambda place: ["eval", place.models.vlm, "--rescore", *more, "--output", "out"]


def with_recipe(*more: str) -> Arguments:
    task = {"name": "t", "source": {"source": "data", "split": "val"}}
    return lambda place: [
        "eval", place.models.vlm, "--recipe", place.recipe(evaluation={"tasks": [task]}), *more, "--output", "out"
    ]  # fmt: skip


UNUSED = {
    "--rescore": (
        rescore,
        (
            ("--data", "data"), ("--split", "val"), ("--limit", "2"), ("--blind",), ("--recipe", "recipe.yaml"),
            ("--batch-size", "32"), ("--max-new-tokens", "32"), ("--sparse", "topk(1)"), ("--resume",),
            ("--sparse-fallback", "auto"), ("seed=1",),
        ),
    ),
    "--recipe": (
        with_recipe,
        (
            ("--split", "val"), ("--scorer", "exact_match"), ("--limit", "2"), ("--max-new-tokens", "32"),
            ("--batch-size", "32"),
        ),
    ),
}  # fmt: skip
"""Options that a mode does not use, also with the value that is the default."""


ROWS: dict[str, Row] = {
    **{
        f"eval {mode}, {given[0]}": Row(
            arguments(*given),
            2,
            (f"{given[0]}: not used with {mode}"),
        )
        for mode, (arguments, options) in UNUSED.items()
        for given in options
    },
    "eval, fallback of no pattern": Row(
        evaluate(more=("--sparse-fallback", "never")), 2, ("--sparse-fallback: not used without --sparse",)
    ),
    "eval, image missing": Row(evaluate(sample(image="no.png")), 1, ("val.jsonl", "line 1", "s1", "no.png")),
    "eval, image empty": Row(evaluate_with(lambda p: p.write("data/bad.png"), BAD), 1, ("s1", "bad.png", "empty")),
    "eval, image cut": Row(evaluate_with(lambda p: cut_image(p, "data/bad.png"), BAD), 1, ("s1", "bad.png", "trunc")),
    "eval, no image": Row(evaluate_with(lambda p: p.write("data/bad.png", "hi"), BAD), 1, ("s1", "bad.png", "not an")),
    "no answer to score": Row(evaluate({"id": "s1", "question": "q"}), 1, ("s1", "no gold answer", "add `answer`")),
    "empty data set, eval": Row(evaluate(""), 1, ("val.jsonl", "empty")),
    "cut in mid line, eval": Row(evaluate(sample(), '{"id": '), 1, ("val.jsonl, line 2", "cut", "repair")),
    "split missing": Row(evaluate(more=("--split", "dev")), 1, ("no dev.jsonl", "train, val")),
    "generated split unknown": Row(
        lambda p: [
            "eval",
            p.models.vlm,
            "--data",
            "generated:characters",
            "--split",
            "tset",
            "--limit",
            "2",
            "--output",
            "out",
        ],
        2,
        ("unknown split 'tset'", "did you mean 'test'"),
    ),
    "endless without limit": Row(
        lambda p: ["eval", p.models.vlm, "--data", "generated:characters", "--split", "test", "--output", "out"],
        2,
        ("endless", "limit"),
    ),
    "evaluation section of a wrong type": Row(
        lambda p: ["eval", p.models.vlm, "--recipe", p.recipe(evaluation=[1]), "--output", "out"],
        2,
        ("'evaluation'", "mapping", "list"),
    ),
    "scorer unknown": Row(evaluate(more=("--scorer", "exakt")), 2, ("'exakt'", "exact_match")),
    "eval of nothing": Row(lambda p: ["eval", p.models.vlm, "--output", "out"], 2, ("--recipe", "--data")),
    "eval of a recipe without tasks": Row(
        lambda p: ["eval", p.models.vlm, "--recipe", p.recipe(), "--output", "out"], 2, ("no tasks", "evaluation.tasks")
    ),
    "rescore of nothing": Row(lambda p: ["eval", p.models.vlm, "--rescore", "--output", "out"], 1, ("no predictions",)),
    "option of a wrong type": Row(evaluate(more=("--limit", "integer")), 2, ("--limit", "integer")),
    "eval of a language model": Row(
        lambda p: ["eval", p.models.text, "--data", p.data(), "--output", "out"], 1, ("'qwen3'", "unclipped assemble")
    ),
}
