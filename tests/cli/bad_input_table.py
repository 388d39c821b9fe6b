"""The table of mistakes: for each the arguments that make it, the exit status and what the one line must say.

The rows stand in `bad_input/`, a file a command; what every command says about its output folder is added here.
"""

from __future__ import annotations

from typing import Any

from bad_input import assemble, chat, data, evaluate, evaluate_encoder, import_encoder, prefill, pretrain, train
from bad_input.row import Arguments, Row, the
from bad_input_support import Place

COMMANDS: dict[str, Arguments] = {
    "assemble": assemble.assemble(the("vision"), the("text")),
    "train": train.train(),
    "pretrain": pretrain.language_model,
    "quickstart": lambda place: ["quickstart", "--output", "out"],
    "eval": evaluate.evaluate(),
    "data stats": data.stats(),
    "import-encoder": import_encoder.original(),
}
"""A command without a mistake each, `out` as its last argument."""


def occupied(arguments: Arguments) -> Arguments:
    """The folder `out` holds a run already."""

    def with_run(place: Place) -> list[Any]:
        place.write("out/training.json", "{}")
        return arguments(place)

    return with_run


def a_file_as_output(arguments: Arguments) -> Arguments:
    def with_file(place: Place) -> list[Any]:
        place.write("out", "not a folder")
        return arguments(place)

    return with_file


def output_rows(command: str, arguments: Arguments) -> dict[str, Row]:
    """What a command says about an output folder that it cannot take."""
    return {
        f"{command}, output holds a run": Row(occupied(arguments), 2, ("--output out", "not empty", "another"), True),
        f"{command}, output is a file": Row(a_file_as_output(arguments), 2, ("--output out", "is a file"), True),
        f"{command}, output inside a file": Row(
            lambda place: [*arguments(place)[:-1], place.write("file") + "/out"],
            1,
            ("file/out", "Not a dir", "another"),
        ),
    }


def joined(*tables: dict[str, Row]) -> dict[str, Row]:
    """One table of all rows. Raises ValueError for a name that stands twice: one of its rows would never run."""
    rows: dict[str, Row] = {}
    for table in tables:
        if twice := rows.keys() & table.keys():
            raise ValueError(f"rows of the same name: {sorted(twice)}; rename one")
        rows |= table
    return rows


ROWS = joined(
    *(
        command.ROWS
        for command in (chat, train, evaluate, evaluate_encoder, pretrain, assemble, import_encoder, data, prefill)
    ),
    *(output_rows(command, arguments) for command, arguments in COMMANDS.items()),
)
