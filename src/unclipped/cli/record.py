"""The folder of a run: opened, told how the run was made, and left as it was found when nothing came of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import typer

from unclipped.core.config import FrozenConfig
from unclipped.core.documents import read_bytes
from unclipped.core.errors import UsageError
from unclipped.core.files import is_empty_folder, new_run_folder, through_links, write_json, write_text
from unclipped.core.lock import LOCK_FILE, folder_lock
from unclipped.data.inputs import INPUTS_FILE, check_inputs
from unclipped.recipes.validation import to_yaml

# What commands write before they have any result; a folder with nothing else in it holds no run.
_BEFORE_RESULTS = {"recipe.yaml", "environment.json", "assembly.json", "task.json", INPUTS_FILE}

# What every run folder holds from its start: the recipe; the quickstart's has the language model first.
_OF_A_RUN = ("recipe.yaml", "language-model")


@contextmanager
def run_folder(output: Path, *, resume: bool = False, can_resume: bool = True) -> Iterator[None]:
    """The folder of a run, for the length of the run.

    When the run fails before it has a result, a folder that was new or empty is again: the corrected command must not
    find it occupied. Of several processes the first one opens it. `can_resume`: whether the command has --resume.
    Raises UsageError when the folder holds something and `resume` is false.
    """
    if not is_first_process():
        yield
        return
    was_there, was_empty = output.exists(), is_empty_folder(output)
    with ExitStack() as lock:
        if output.is_dir():  # before anything is said about what lies in it: a live run is to be left alone
            lock.enter_context(folder_lock(output))
        if resume and was_empty:
            typer.echo(f"nothing to resume in {output}: starting anew")
        elif resume and output.is_dir() and not any((output / name).exists() for name in _OF_A_RUN):
            raise UsageError(f"--resume: {output} holds no run of this program; choose another --output")
        new_run_folder(output, resume=resume, can_resume=can_resume)
        if not was_there:
            lock.enter_context(folder_lock(output))
        try:
            yield
        except BaseException:
            if was_empty and output.is_dir() and all(_is_before_results(path) for path in output.rglob("*")):
                folder = through_links(output)
                shutil.rmtree(folder, ignore_errors=True)  # why the run failed must be seen, not that this did
                if was_there:
                    folder.mkdir(exist_ok=True)
            raise


def _is_before_results(path: Path) -> bool:
    return path.is_dir() or path.name in {*_BEFORE_RESULTS, LOCK_FILE}


def is_first_process() -> bool:
    """Whether this process writes: the only one, or rank 0 of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def record_run(
    config: FrozenConfig, output: Path, *, resume: bool, accelerators: bool = True, model: str | None = None
) -> None:
    """Write `recipe.yaml` (reading it again gives the same run), `environment.json` and `inputs.json` into the folder.

    inputs.json: digests of the data and models that the recipe names, and of `model`, which it does not.
    accelerators: name those of the machine, for which torch is loaded. Of several processes the first one does. Raises
    UsageError when `resume` meets a folder whose recipe or files are others: going on would mix two runs.
    """
    from unclipped.studies.environment import environment

    if not is_first_process():
        return
    text = to_yaml(config)
    path = output / "recipe.yaml"
    if resume and path.exists() and read_bytes(path) != text.encode():
        raise UsageError(
            f"--resume: {path} differs from the recipe given; resume with "
            f"the same recipe ('{path}' itself works), or choose another --output"
        )
    was_begun = resume and path.exists()
    if check_inputs(output, [config, model], resume=resume) is False and was_begun:
        typer.echo(f"{output} keeps no digests of its data: whether they changed since it began cannot be checked")
    write_text(path, text)
    write_json(output / "environment.json", environment(accelerators=accelerators))
