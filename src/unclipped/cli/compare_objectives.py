"""`unclipped compare-objectives`: encoders pretrained by several objectives on equal terms, and what each is worth."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Compare pretraining objectives on equal terms: same images, same architecture, same samples seen.

Each arm of RECIPE (a YAML file or a built-in name) pretrains an encoder; probes measure its frozen features; then each
encoder is joined to the same language model and trained on the same data, beside random weights and a blind model.
OUTPUT gets comparison.json, report.html, and every run with a report of its own.

Examples:

  unclipped compare-objectives clothing-objectives --output runs/objectives

  unclipped compare-objectives clothing-objectives pretrain.steps=2000 --output runs/longer

  unclipped compare-objectives clothing-objectives seeds=[0,1,2] --output runs/three-seeds

  unclipped compare-objectives my-comparison.yaml --output runs/mine --resume
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("compare-objectives", help=HELP)(compare_objectives)


def compare_objectives(
    recipe: str = typer.Argument(..., help="Recipe file or built-in name."),
    overrides: list[str] = typer.Argument(None, help="Changes, key.path=value."),
    output: Path = typer.Option(..., help="Folder of the comparison."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted comparison in OUTPUT."),
) -> None:
    """Compare objectives (see HELP)."""
    from unclipped.recipes.schema import ComparisonRecipe
    from unclipped.recipes.validation import load_recipe, to_yaml

    config = load_recipe(recipe, ComparisonRecipe, overrides)
    from unclipped.cli.record import record_run, run_folder

    with run_folder(output, resume=resume):
        record_run(config, output, resume=resume)
        from unclipped.studies.comparison_seeds import run_seeds

        run_seeds(config, output, resume=resume, recipe_text=to_yaml(config), say=typer.echo)
    typer.echo(f"\nreport: {output / 'report.html'}")
