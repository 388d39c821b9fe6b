"""`unclipped assemble`: two checkpoints become one folder."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Join a vision encoder and a language model into one model folder.

The folder loads with AutoModelForImageTextToText and AutoProcessor after `import unclipped`.

Examples:

  unclipped assemble --vision ./my-vit --text ./my-lm --output model

  unclipped assemble --vision llm:./my-lm --text ./my-lm --connector "pixel_shuffle(2x2) + mlp(2)" --output model

  unclipped assemble --vision facebook/webssl-dino1b-full2b-224 --text Qwen/Qwen3-0.6B --output model
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("assemble", help=HELP)(assemble)


def assemble(
    context: typer.Context,
    vision: str = typer.Option(..., help="Encoder: folder, hub id, or llm:FOLDER / llm:ID (made from a decoder)."),
    text: str = typer.Option(..., help="Decoder language model: a folder or a hub id."),
    output: Path = typer.Option(..., help="Folder to write; must be new or empty."),
    connector: str = typer.Option("mlp(2)", help='Connector, e.g. "linear", "average(2) + mlp(2)".'),
    baseline: bool = typer.Option(False, "--baseline", help="Allow a contrastively trained encoder as a baseline."),
    patch_size: int = typer.Option(None, help="Patch side in pixels, for llm: encoders only.  [default: 16]"),
    rope: str = typer.Option(None, help="2-D rotary form of llm: encoders: axial or penguin.  [default: axial]"),
    seed: int = typer.Option(0, help="Seed of the new weights (connector, patch embedding)."),
) -> None:
    """Assemble and save a model folder (see HELP)."""
    from unclipped.cli.modes import refuse_unused
    from unclipped.cli.record import run_folder
    from unclipped.models.config import ModelConfig
    from unclipped.recipes.validation import validate

    fields: dict[str, object] = {"vision": vision, "text": text, "connector": connector, "baseline": baseline}
    fields["seed"] = seed
    if patch_size is not None or vision.startswith("llm:"):
        fields["patch_size"] = 16 if patch_size is None else patch_size
    if not vision.startswith("llm:"):
        refuse_unused(context, "for an encoder that is not made from a language model (llm:…)", ("rope",))
    if rope is not None:
        fields["rope"] = rope
    config = validate(fields, ModelConfig, "assemble")

    with run_folder(output, can_resume=False):
        from unclipped.models.assemble import assemble_from_config
        from unclipped.models.checkpoint import save_model

        model, processor, report = assemble_from_config(config, seed=config.seed)
        save_model(model, processor, output)
    typer.echo("\n".join(report.lines()))
    typer.echo(f"\nsaved: {output}\nnext:  unclipped chat {output} IMAGE -q 'What is shown?'   (after training it)")
