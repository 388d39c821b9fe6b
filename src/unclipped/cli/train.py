"""`unclipped train`: assemble, train in stages, evaluate beside baselines trained alike, report."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Run a training recipe: assemble the model, train it in stages, evaluate it, write the report.

RECIPE is a YAML file or a built-in name (`unclipped recipes`); fields are changed with key.path=value.
On several processes: torchrun --nproc-per-node 2 -m unclipped train RECIPE --output DIR

Examples:

  unclipped train nlvr model.text=runs/lm/model model.vision.llm=runs/lm/model --output runs/nlvr

  unclipped train my-recipe.yaml stages.all.steps=500 training.seed=1 --output runs/mine

  unclipped train my-recipe.yaml --output runs/mine --resume
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("train", help=HELP)(train)


def train(
    recipe: str = typer.Argument(..., help="Recipe file or built-in name."),
    overrides: list[str] = typer.Argument(None, help="Changes, key.path=value."),
    output: Path = typer.Option(..., help="Run folder; the model is written to OUTPUT/model."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted run in OUTPUT."),
) -> None:
    """Run a training recipe (see HELP)."""
    from unclipped.recipes.schema import TrainRecipe
    from unclipped.recipes.validation import load_recipe, to_yaml

    config = load_recipe(recipe, TrainRecipe, overrides)
    from unclipped.cli.record import record_run, run_folder

    with run_folder(output, resume=resume):
        record_run(config, output, resume=resume)
        from unclipped.studies.experiment import run_experiment

        run_experiment(
            config,
            output,
            resume=resume,
            recipe_text=to_yaml(config),
            next_commands=[("ask the model", f"unclipped chat {output / 'model'} IMAGE -q QUESTION")],
            say=typer.echo,
        )
    typer.echo(f"\nreport: {output / 'report.html'}\nnext:   unclipped chat {output / 'model'} IMAGE")
