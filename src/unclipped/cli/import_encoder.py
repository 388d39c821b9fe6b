"""`unclipped import-encoder`: weights with original names become a folder that loads anywhere."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Turn a weights file of DINOv2, Web-SSL, DINO or MAE into an encoder folder in the transformers format.

CHECKPOINT is a .pth, .pt or .safetensors file with the names of the code that trained it: an encoder alone, or a
training with teacher, student and heads. Nothing in the file is run. Widths, depth, patch, image side and registers are
read off the tensors; each tensor is taken or named as left out. DINO and iBOT heads are kept in dino_heads/.

Examples:

  unclipped import-encoder dinov2_vitl14_pretrain.pth --output models/dinov2-l

  unclipped import-encoder webssl_dino1b_full2b_224_ssl_teacher.pth --output models/webdino-1b

  unclipped import-encoder webssl_dino1b_full2b_224.pth --dino-heads heads.pth --output models/webdino-1b

  unclipped import-encoder mae_pretrain_vit_base_full.pth --decoder --output models/mae-b
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("import-encoder", help=HELP)(import_encoder)


def import_encoder(
    checkpoint: str = typer.Argument(..., help="File with the weights: .pth, .pt or .safetensors."),
    output: Path = typer.Option(..., help="Folder to write; must be new or empty."),
    weights: str = typer.Option(None, help="teacher or student, of a file with both.  [default: teacher]"),
    dino_heads: str = typer.Option(None, help="File that holds the DINO and iBOT heads of this encoder alone."),
    attention_heads: int = typer.Option(None, help="Attention heads.  [default: those of the published width]"),
    decoder: bool = typer.Option(False, "--decoder", help="Keep a masked autoencoder's decoder (vit_mae)."),
    decoder_heads: int = typer.Option(None, help="Attention heads of the decoder.  [default: 16 for width 512]"),
    raw_pixels: bool = typer.Option(False, "--raw-pixels", help="The decoder predicts pixels as they are."),
    mean: str = typer.Option(None, help="Mean of each channel, with commas.  [default: ImageNet's]"),
    std: str = typer.Option(None, help="Standard deviation of each channel, with commas.  [default: ImageNet's]"),
    objective: str = typer.Option(None, help="How it was trained.  [default: self_supervised]"),
    leave_out: list[str] = typer.Option(None, help="Name or pattern of tensors to leave out; may be repeated."),
) -> None:
    """Import an encoder (see HELP)."""
    from unclipped.cli.record import run_folder
    from unclipped.encoders.importing.config import ImportConfig
    from unclipped.recipes.validation import validate

    given: dict[str, object] = {
        "weights": weights,
        "dino_heads": dino_heads,
        "attention_heads": attention_heads,
        "decoder_heads": decoder_heads,
        "mean": None if mean is None else mean.split(","),
        "std": None if std is None else std.split(","),
        "objective": objective,
        "leave_out": leave_out or None,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    fields |= {"checkpoint": checkpoint, "decoder": decoder, "normalised_pixels": not raw_pixels}
    config = validate(fields, ImportConfig, "import-encoder")
    with run_folder(output, can_resume=False):
        from unclipped.objectives.import_encoder import import_encoder as run

        typer.echo(f"reading     {checkpoint}")
        report = run(config, output)
    typer.echo("\n".join(report.lines()))
    typer.echo(
        f"\nsaved: {output}\nnext:  unclipped assemble --vision {output} --text LANGUAGE_MODEL --output MODEL, or\n"
        f"       unclipped eval-encoder {output} --data IMAGES --output RUN"
    )
