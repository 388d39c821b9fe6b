"""Evaluations kept on disk: where a run keeps the predictions of its tasks, and whether they are whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unclipped.core.documents import read_json
from unclipped.core.errors import DataError, UsageError
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.predictions import TASK_FILE, Prediction, PredictionFile
from unclipped.evaluation.results import is_task_result
from unclipped.evaluation.runner import RESULTS_FILE, TASK_RESULT_FILE, settings_of

_PLACES = ("evaluation/predictions", "predictions", ".")
"""Where predictions stand below a run: of training, of an evaluation, and the folder of predictions itself."""


@dataclass(frozen=True)
class KeptTask:
    """The predictions of one task with the settings that they were made with."""

    task: TaskConfig
    config: EvaluationConfig
    images: str
    predictions: list[Prediction]


def named_runs(given: Sequence[str]) -> dict[str, str]:
    """{name: folder} of `NAME=FOLDER` or `FOLDER`, in the order given; a folder without a name is called like itself.

    Raises UsageError for an empty name or folder, a name used twice, and a folder given twice.
    """
    runs: dict[str, str] = {}
    for text in given:
        name, folder = _named(text)
        same = next((other for other, path in runs.items() if Path(path).resolve() == Path(folder).resolve()), None)
        if same is not None:
            raise UsageError(f"runs '{same}' and '{name}' are the same folder {folder}; give two different runs")
        if name in runs:
            raise UsageError(f"two runs are called '{name}' ({runs[name]} and {folder}); give them names: NAME=FOLDER")
        runs[name] = folder
    return runs


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or "/" in name or Path(text).is_dir():  # a folder may have = in its own name
        name, folder = _name_of(Path(text)), text
    if not name.strip() or not folder:
        raise UsageError(f"run '{text}': expected FOLDER or NAME=FOLDER")
    return name, folder


def _name_of(folder: Path) -> str:
    """The last part of the path that says which run it is."""
    path = Path(os.path.abspath(folder))
    if path.name == "predictions-blind":
        return f"{path.parent.name}-blind"
    while path.name in ("predictions", "evaluation"):
        path = path.parent
    return path.name


def task_folders(folder: str | Path) -> dict[str, Path]:
    """{task: folder of its predictions} of a run, in the order of their names.

    folder: what `unclipped eval` wrote, what `unclipped train` wrote (of its model, or one below its `baselines`), or a
    folder of predictions such as `predictions-blind`. Raises DataError when there are none, UsageError when the
    folder does not exist or its evaluation is not finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give the folder of a run")
    for place in _PLACES:
        found = {path.parent.name: path.parent for path in sorted((folder / place).glob(f"*/{TASK_FILE}"))}
        if not found:
            continue
        results = Path(os.path.abspath(folder / place)).parent / RESULTS_FILE
        if not results.is_file():
            raise DataError(
                f"{folder}: its evaluation is not finished ({results.name} is missing beside {(folder / place).name}); "
                "go on with it (--resume)"
            )
        return found
    below = [path.parents[2] for path in sorted(folder.rglob(f"predictions/*/{TASK_FILE}"))]
    runs = list(dict.fromkeys(str(path.parent if path.name == "evaluation" else path) for path in below))
    hint = f"; there are some in {', '.join(runs[:3])}{' and others' if len(runs) > 3 else ''}" if runs else ""
    raise DataError(
        f"{folder}: holds no predictions (expected {_PLACES[1]}/TASK or {_PLACES[0]}/TASK); give what unclipped eval "
        f"wrote, or unclipped train with tasks in its evaluation{hint}"
    )


def read_task(folder: Path) -> KeptTask:
    """The predictions kept in a task's folder. Raises DataError when they are damaged or not all there."""
    file = PredictionFile(folder)
    task, config, images = settings_of(file)
    result = folder / TASK_RESULT_FILE
    if not result.is_file():
        raise DataError(
            f"{folder}: the evaluation of this task is not finished ({result.name} is missing); "
            "go on with it (--resume)"
        )
    rows = file.read()
    remedy = "score again with unclipped eval --rescore"
    found = read_json(result, root=None, remedy=remedy)
    if not is_task_result(found):
        raise DataError(f"{result}: not the result of a task; {remedy}")
    if (counted := found["overall"]["count"]) != len(rows):
        raise DataError(
            f"{file.path}: holds {len(rows):,} predictions where {result.name} beside it counts {counted:,}; copy the "
            "folder again, or evaluate again"
        )
    return KeptTask(task, config, images, rows)
