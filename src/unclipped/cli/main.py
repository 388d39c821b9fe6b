"""Entry point of the command `unclipped`: runs it, and turns errors into one line and an exit status.

Everything heavy is imported inside `main`, so that Ctrl-C ends quietly while modules load, too.
"""

from __future__ import annotations

import io
import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 a failed run, 2 bad usage or recipe, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or an answer that the terminal's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(sys.argv[1:] or ["--help"])
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        if os.environ.get("UNCLIPPED_DEBUG"):
            raise
        if _was_interrupted(error):
            status = INTERRUPTED
        else:
            found = _line_of(error)
            if found is None:
                raise
            line, status = found
            print(f"error: {line}", file=sys.stderr)
            sys.exit(status)
    if status == INTERRUPTED:
        print("error: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _run(arguments: list[str]) -> object:
    from unclipped.core.documents import check_text
    from unclipped.core.errors import UsageError

    for argument in arguments:
        check_text(argument, "command line: an argument is no text in this locale", UsageError)
    import typer

    from unclipped.cli.app import app

    try:
        return app(arguments, prog_name="unclipped", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: libraries wrap it when it meets them, as pydantic does in its schemas."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line_of(error: Exception) -> tuple[str, int] | None:
    """One line for the user and the exit status; None for what is no mistake of the user but of the program."""
    import typer

    from unclipped.core.errors import UnclippedError

    if isinstance(error, UnclippedError):
        return str(error), error.exit_code
    if isinstance(error, typer.BadParameter.__mro__[1]):  # base of what typer raises for wrong arguments
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "unclipped"
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        return f"{message}; see '{command} --help'", 2
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"{named}{error.strerror}; free space, correct the path or its permissions", 1
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in first:
        return f"out of memory; lower the batch size or raise gradient_accumulation ({first})", 1
    return None


if __name__ == "__main__":
    main()
