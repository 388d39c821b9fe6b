"""Errors that a user can act on: one line each, naming what was found, what was expected and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnclippedError(Exception):
    """A run that failed for a stated reason. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(UnclippedError):
    """Wrong usage: a bad argument, an unknown or mistyped recipe field."""

    exit_code = 2


class DataError(UnclippedError):
    """A file or a sample that cannot be used; the message names it."""


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
