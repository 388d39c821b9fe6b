"""`unclipped quickstart`: from nothing to a trained, evaluated and questioned model in some minutes."""

from __future__ import annotations

import math
from pathlib import Path

import typer

from unclipped.core.errors import UsageError

HELP = """Train, evaluate and report a small vision-language model. No GPU, no network, no data set is needed.

A tokenizer and a text-only language model are trained on generated text, the vision encoder is made from that language
model, both are joined and trained in stages on generated images, and the result is tested beside a blind run and a run
with a random encoder, each trained alike. OUTPUT/report.html tells what happened.

Examples:

  unclipped quickstart --output quickstart

  unclipped quickstart --minutes 3 --output quick

  unclipped quickstart --output quickstart --resume
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("quickstart", help=HELP)(quickstart)


def quickstart(
    context: typer.Context,
    overrides: list[str] = typer.Argument(None, help="Changes to the recipe, key.path=value."),
    output: Path = typer.Option(Path("quickstart"), help="Run folder; must be new or empty."),
    minutes: float = typer.Option(
        None,
        min=0.5,
        max=600.0,
        help="About how long it may take; sets the steps. Default: 8.5, or more where needed.",
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted quickstart in OUTPUT."),
) -> None:
    """Run the quickstart (see HELP)."""
    from unclipped.cli.modes import refuse_unused
    from unclipped.cli.record import run_folder

    if any(override.startswith("stages") for override in overrides or []):
        refuse_unused(context, "where stages are changed, which sets the steps as well", ("minutes",))
    if minutes is not None and math.isnan(minutes):  # which no range keeps out
        raise UsageError("--minutes: expected a number from 0.5 to 600, found nan")
    with run_folder(output, resume=resume):
        from unclipped.cli.quickstart_run import run

        run(output, minutes=minutes, overrides=overrides or [], resume=resume)
