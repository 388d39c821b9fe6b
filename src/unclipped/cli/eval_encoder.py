"""`unclipped eval-encoder`: what an encoder's features are worth, against random weights and raw pixels."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Evaluate an encoder: k-NN, linear, segmentation and fine-tuning probes with 95 % intervals.

ENCODER is a folder, a hub id, or llm: and either of them. Every figure stands beside that of the same architecture with
random weights and that of raw pixels, with the paired differences. An encoder that was trained with its text side also
names classes (field zero_shot) and retrieves captions (field retrieval). --recipe takes a YAML file or a built-in name
(`unclipped recipes`). Fields of the evaluation (see docs/encoder-evaluation.md) are changed with key.path=value.

Examples:

  unclipped eval-encoder runs/vit/model --data ./my-photos --output runs/vit-probes

  unclipped eval-encoder facebook/dinov2-small --data ./my-photos linear.steps=12500 --output runs/dinov2-probes

  unclipped eval-encoder llm:my-lm image_size=112 --data generated:shapes --output runs/lm-probes

  unclipped eval-encoder runs/vit/model --segmentation generated:shapes --output runs/vit-masks

  unclipped eval-encoder runs/vit/model --data ./my-photos fine_tuning.steps=500 --output runs/vit-tuned

  unclipped eval-encoder runs/vit/model --recipe probe-position --output runs/vit-position

  unclipped eval-encoder facebook/dinov2-small --recipe imagenet data.source=/data/imagenet --output runs/imagenet

  unclipped eval-encoder runs/vit/model --data ./my-photos --output runs/vit-probes --resume
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("eval-encoder", help=HELP)(eval_encoder)


def eval_encoder(
    encoder: str = typer.Argument(..., help="Encoder folder, hub id, or llm:ID."),
    overrides: list[str] = typer.Argument(None, help="Changes to the evaluation, key.path=value."),
    output: Path = typer.Option(..., help="Run folder for features, predictions and results."),
    data: str = typer.Option(None, help="Labelled images: class folders, question files, or generated:shapes."),
    segmentation: str = typer.Option(None, help="Images with masks: a folder, or generated:shapes."),
    recipe: str = typer.Option(None, help="Built-in recipe, or YAML file (a run's recipe.yaml)."),
    baseline: bool = typer.Option(False, "--baseline", help="Declare a contrastively trained encoder as a baseline."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted evaluation in OUTPUT."),
) -> None:
    """Probe an encoder (see HELP)."""
    from unclipped.cli.record import record_run, run_folder
    from unclipped.recipes.loading import apply_overrides, merge, read_recipe
    from unclipped.recipes.schema import EncoderEvaluationRecipe
    from unclipped.recipes.validation import validate

    section = {} if recipe is None else read_recipe(recipe)
    given: dict[str, object] = {"encoder": encoder}
    if data is not None:
        given["data"] = {"source": data}
    if segmentation is not None:
        given["segmentation"] = {"source": segmentation}
    if baseline:
        given["baseline"] = True
    where = "eval-encoder" if recipe is None else f"recipe {recipe}"
    config = validate(apply_overrides(merge(section, given), overrides or []), EncoderEvaluationRecipe, where)
    with run_folder(output, resume=resume):
        record_run(config, output, resume=resume)
        from unclipped.audit.runner import evaluate_encoder

        evaluate_encoder(config, output)
