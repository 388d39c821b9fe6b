"""`unclipped pretrain`: a language model from text, or a vision encoder from images."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Train a small language model (and its tokenizer) or a vision encoder from nothing.

RECIPE is a YAML file or a built-in name (`unclipped recipes`); fields are changed with key.path=value.

Examples:

  unclipped pretrain quickstart-lm --output runs/lm

  unclipped pretrain real-lm data.sources.0.source=books.txt.gz steps=500 --output runs/lm

  unclipped pretrain clothing-mae --output runs/vit --resume
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("pretrain", help=HELP)(pretrain)


def pretrain(
    recipe: str = typer.Argument(..., help="Recipe file or built-in name."),
    overrides: list[str] = typer.Argument(None, help="Changes, key.path=value."),
    output: Path = typer.Option(..., help="Run folder; the model is written to OUTPUT/model."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted run in OUTPUT."),
) -> None:
    """Pretrain one part (see HELP)."""
    from unclipped.recipes.schema import PretrainRecipe
    from unclipped.recipes.validation import load_recipe, to_yaml

    config = load_recipe(recipe, PretrainRecipe, overrides)
    from unclipped.cli.record import is_first_process, record_run, run_folder

    with run_folder(output, resume=resume):
        record_run(config, output, resume=resume)
        from unclipped.training.pretrain import pretrain as run

        run(config, output, resume=resume)
        if is_first_process():
            from unclipped.studies.pretraining_report import write_pretraining_report

            model = output / "model"
            if config.objective == "language_model":
                next_command = ("make it an encoder, too", f"assemble --vision llm:{model} --text {model} --output VLM")
            else:
                next_command = ("measure its features", f"eval-encoder {model} --data IMAGES --output {output}-probes")
            report = write_pretraining_report(
                config,
                output,
                title=f"Pretraining: {Path(recipe).stem}",
                description=config.description,
                recipe_text=to_yaml(config),
                next_commands=[(next_command[0], f"unclipped {next_command[1]}")],
            )
            typer.echo(f"report: {report}")
