"""Modes of a command, and the options that each leaves unused: an option that would be dropped is refused."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from unclipped.core.errors import UsageError


def refuse_unused(context: typer.Context, mode: str, names: Iterable[str], *, remedy: str = "leave it out") -> None:
    """Raise UsageError for the first of the parameters `names` that was given, though `mode` does not use it.

    mode: what the sentence says, such as `with --rescore`. A default is not given; neither is an empty argument.
    """
    options = {parameter.name: parameter for parameter in context.command.params}
    for name in names:
        source = context.get_parameter_source(name)
        if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
            continue
        value = context.params[name]
        if options[name].param_type_name == "argument":
            if value:
                shown = value[0] if isinstance(value, list | tuple) else value
                raise UsageError(f"{shown}: not used {mode}; {remedy}")
            continue
        option = max(options[name].opts, key=len)
        raise UsageError(f"{option}: not used {mode}; {remedy}")
