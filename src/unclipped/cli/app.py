"""Commands of `unclipped`, entered in one application, one thin file each."""

from __future__ import annotations

import os

import typer

from unclipped import __version__
from unclipped.cli import (
    assemble,
    chat,
    compare,
    compare_objectives,
    data,
    eval_encoder,
    evaluate,
    import_encoder,
    prefill,
    pretrain,
    quickstart,
    recipes,
    train,
)

app = typer.Typer(
    name="unclipped",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Vision-language models without CLIP: assemble, train, evaluate, question.\n\n"
    "First run, no network needed:  unclipped quickstart --output quickstart",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unclipped {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    if debug:
        os.environ["UNCLIPPED_DEBUG"] = "1"


for command in (
    quickstart,
    import_encoder,
    assemble,
    pretrain,
    train,
    evaluate,
    compare,
    eval_encoder,
    compare_objectives,
    data,
    chat,
    prefill,
    recipes,
):
    command.register(app)
