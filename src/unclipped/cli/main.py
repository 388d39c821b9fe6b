"""The command `unclipped`: registers one thin file a command, and turns errors into one line and an exit status."""

from __future__ import annotations

import os
import sys

import typer

from unclipped import __version__
from unclipped.cli import assemble, chat, evaluate, pretrain, quickstart, recipes, train
from unclipped.core.errors import UnclippedError

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


for command in (quickstart, assemble, pretrain, train, evaluate, chat, recipes):
    command.register(app)


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 a failed run, 2 bad usage or recipe, 130 interrupted."""
    try:
        app()
    except UnclippedError as error:
        if os.environ.get("UNCLIPPED_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
