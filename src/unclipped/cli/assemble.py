"""`unclipped assemble`: two checkpoints become one folder."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Join a vision encoder and a language model into one model folder.

The folder loads with AutoModelForImageTextToText and AutoProcessor after `unclipped.register()`.

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
    text: str = typer.Option(..., help="Decoder language model: a folder, a hub id or a GGUF file."),
    output: Path = typer.Option(..., help="Folder to write; must be new or empty."),
    connector: str = typer.Option("mlp(2)", help='Connector, e.g. "linear", "average(2) + mlp(2)".'),
    baseline: bool = typer.Option(False, "--baseline", help="Allow a contrastively trained encoder as a baseline."),
    patch_size: int = typer.Option(None, help="llm: encoders: side of a patch in pixels.  [default: 14]"),
    rope: str = typer.Option(None, help="llm: encoders: 2-D rotary form, axial or penguin.  [default: axial]"),
    layers: int = typer.Option(None, help="llm: encoders: the first so many layers.  [default: all]"),
    seed: int = typer.Option(0, help="Seed of the new weights (connector, patch embedding)."),
) -> None:
    """Assemble and save a model folder (see HELP)."""
    from unclipped.cli.modes import refuse_unused
    from unclipped.cli.record import run_folder
    from unclipped.encoders.source import parse_vision
    from unclipped.models.config import ModelConfig
    from unclipped.recipes.validation import validate

    source = parse_vision(vision)
    if isinstance(source, dict):
        given = {"patch_size": patch_size, "rope": rope, "layers": layers}
        source |= {name: value for name, value in given.items() if value is not None}
    else:
        own = ("patch_size", "rope", "layers")
        refuse_unused(context, "for an encoder that is not made from a language model (llm:…)", own)
    fields = {"vision": source, "text": text, "connector": connector, "baseline": baseline, "seed": seed}
    config = validate(fields, ModelConfig, "assemble")

    with run_folder(output, can_resume=False):
        from unclipped.models.assemble import assemble as join
        from unclipped.models.checkpoint import save_model

        model, processor, report = join(config)
        save_model(model, processor, output)
    typer.echo("\n".join(report.lines()))
    typer.echo(f"\nsaved: {output}\nnext:  unclipped chat {output} IMAGE -q 'What is shown?'   (after training it)")
