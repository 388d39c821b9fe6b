"""Errors that a user can act on: one line each, naming what was found, what was expected and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

MAX_MESSAGE = 4000
"""Characters of one error message."""


def _one_line(text: str) -> str:
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE]} … ({len(text) - MAX_MESSAGE:,} more characters)"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class UnclippedError(Exception):
    """A run that failed for a stated reason. The command line prints it as one line and exits with `exit_code`.

    Messages quote file names, fields and values of unknown origin. What a terminal cannot print, or would obey, is
    written as an escape, and a message ends after MAX_MESSAGE characters.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(_one_line(str(message)))


class UsageError(UnclippedError, ValueError):
    """Wrong usage: a bad argument, an unknown or mistyped recipe field. Also a ValueError, which callers expect."""

    exit_code = 2


class DataError(UnclippedError, ValueError):
    """A file or a sample that cannot be used; the message names it. Also a ValueError, which callers expect."""


class ImageError(DataError):
    """An image that cannot be decoded or does not fit the rule; the message names the file."""


class CheckpointError(UnclippedError):
    """A checkpoint whose tensors do not fit the model; the message lists them."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Hint for an unknown name: the closest valid one when there is one, and the list of valid names.

    >>> nearest("conector", ["connector", "vision"])
    "did you mean 'connector'? valid: connector, vision"
    """
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listed = ", ".join(options) if options else "none"
    return f"did you mean '{close[0]}'? valid: {listed}" if close else f"valid: {listed}"


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's type when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def guarded(complaint: Callable[[str], UnclippedError]) -> Iterator[None]:
    """Turn whatever a third-party call raises into the error that `complaint` makes from its first line.

    Use it tight around the call, never around our own code. Errors of ours pass through. The cause is kept, so that
    `--debug` shows it.

    >>> with guarded(lambda reason: DataError(f"x.bin: cannot be read ({reason}); save it again")):
    ...     int("x")
    Traceback (most recent call last):
    unclipped.core.errors.DataError: x.bin: cannot be read (invalid literal for int() with base 10: 'x'); save it again
    """
    try:
        yield
    except UnclippedError:
        raise
    except Exception as error:
        raise complaint(first_line(error)) from error
