"""`unclipped eval`: score a saved model on tasks, with intervals and a blind baseline."""

from __future__ import annotations

import re
from pathlib import Path

import typer

HELP = """Evaluate a model folder: per-category scores with 95 % intervals, raw predictions kept.

The tasks come from a recipe (its `evaluation` section), or from one data set given directly. An option that the chosen
way does not use is refused.

Examples:

  unclipped eval runs/nlvr/model --recipe nlvr --output runs/nlvr-eval

  unclipped eval model --data ./my-folder --split val --scorer exact_match --blind --output runs/eval

  unclipped eval model --data generated:characters --split test --limit 400 --output runs/eval

  unclipped eval model --output runs/eval --rescore

  unclipped eval model --output runs/eval --rescore --scorer character_error_rate
"""

_TASK = ("split", "scorer", "limit", "max_new_tokens", "batch_size")
_UNUSED_WITH = {
    "--recipe": ("data", *_TASK),
    "--rescore": (
        "overrides", "recipe", "data", *(name for name in _TASK if name != "scorer"), "blind", "sparse",
        "sparse_fallback", "resume",
    ),
}  # fmt: skip
"""Parameters that say nothing in a mode: a recipe's tasks have their own, and kept answers are scored as they are."""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("eval", help=HELP)(evaluate)


def evaluate(
    context: typer.Context,
    model: Path = typer.Argument(..., help="Model folder (or hub id of a model in our format)."),
    overrides: list[str] = typer.Argument(None, help="Changes to the evaluation section, key.path=value."),
    output: Path = typer.Option(..., help="Run folder for predictions and results."),
    recipe: str = typer.Option(None, help="Recipe whose evaluation section is used."),
    data: str = typer.Option(None, help="A data set: a folder or file, or generated:NAME."),
    split: str = typer.Option("val", help="Split of --data."),
    scorer: str = typer.Option(
        None,
        help="Scorer of --data, or with --rescore of all tasks.  [exact_match, or as asked]",
    ),
    limit: int = typer.Option(None, help="At most this many items of --data."),
    max_new_tokens: int = typer.Option(32, help="Longest answer in tokens, for --data."),
    batch_size: int = typer.Option(32, help="Questions a batch, for --data."),
    blind: bool = typer.Option(False, "--blind", help="Also answer with the image removed."),
    sparse: str = typer.Option(None, help="Prefill under this pattern, e.g. 'global_text + sink(128) + topk(16)'."),
    sparse_fallback: str = typer.Option("auto", help="auto: dense where sparse does not pay; never: always sparse."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted evaluation in OUTPUT."),
    rescore: bool = typer.Option(False, "--rescore", help="Score the kept predictions again; no model is loaded."),
) -> None:
    """Score a model (see HELP)."""
    from contextlib import nullcontext

    from unclipped.cli.modes import refuse_unused
    from unclipped.cli.record import record_run, run_folder
    from unclipped.core.errors import UsageError
    from unclipped.core.lock import folder_lock
    from unclipped.evaluation.config import EvaluationConfig
    from unclipped.recipes.loading import apply_overrides, read_recipe
    from unclipped.recipes.validation import validate

    if rescore:
        refuse_unused(context, "with --rescore", _UNUSED_WITH["--rescore"])
        from unclipped.evaluation.runner import rescore as run_rescore

        with folder_lock(output) if output.is_dir() else nullcontext():
            run_rescore(output, scorer=scorer)
        return
    if (recipe is None) == (data is None):
        raise UsageError("eval: give either --recipe NAME or --data FOLDER (or generated:NAME)")
    if recipe is not None:
        refuse_unused(
            context, "with --recipe", _UNUSED_WITH["--recipe"], remedy="change evaluation fields by key.path=value"
        )
    if sparse is None:
        refuse_unused(context, "without --sparse", ("sparse_fallback",))
    if recipe is not None:
        section = read_recipe(recipe).get("evaluation") or {}
        if not isinstance(section, dict):
            raise UsageError(f"recipe {recipe}: field 'evaluation': expected a mapping, found {type(section).__name__}")
    else:
        source = {"source": data, "split": split}
        task = {"name": task_name(data), "source": source, "scorer": scorer or "exact_match"}
        section = {"tasks": [task | {"max_new_tokens": max_new_tokens, "limit": limit}], "batch_size": batch_size}
    if blind:
        section["blind"] = True
    if sparse is not None:
        section["sparse"] = {"pattern": sparse, "fallback": sparse_fallback}
    config = validate(
        apply_overrides(section, overrides or []), EvaluationConfig, f"recipe {recipe}" if recipe else "eval"
    )
    with run_folder(output, resume=resume):
        record_run(config, output, resume=resume, model=str(model))
        from unclipped.evaluation.runner import evaluate_model

        evaluate_model(str(model), config, output, resume=resume)


def task_name(data: str) -> str:
    """The name of the file, folder or generated task, with letters that a task's name may have."""
    stem = Path(data.removeprefix("generated:")).absolute().stem
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", stem).strip("_.+-") or "data"
