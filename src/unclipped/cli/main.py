"""The command `unclipped`: registers one thin file a command, and turns errors into one line and an exit status."""

from __future__ import annotations

import os
import sys

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
from unclipped.core.errors import UnclippedError

INTERRUPTED = 130

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


# Base of what typer raises for wrong arguments.
_WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 a failed run, 2 bad usage or recipe, 130 interrupted."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="unclipped", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        if os.environ.get("UNCLIPPED_DEBUG"):
            raise
        found = _line_of(error)
        if found is None:
            raise
        line, status = found
        print(f"error: {line}", file=sys.stderr)
        sys.exit(status)
    if status == INTERRUPTED:
        print("error: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _line_of(error: Exception) -> tuple[str, int] | None:
    """One line for the user and the exit status; None for what is no mistake of the user but of the program."""
    if isinstance(error, UnclippedError):
        return str(error), error.exit_code
    if isinstance(error, _WrongUsage):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "unclipped"
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        return f"{message}; see '{command} --help'", 2
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"{named}{error.strerror}; free space, correct the path or its permissions", 1
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        first = next(iter(str(error).splitlines()), "")
        return f"out of memory; lower the batch size or raise gradient_accumulation ({first})", 1
    return None


if __name__ == "__main__":
    main()
