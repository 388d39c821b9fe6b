"""Run tasks: ask every question, keep every raw answer, compute the figures; stop and go on at any point."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import write_json
from unclipped.core.progress import counting
from unclipped.data.inputs import check_inputs
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.predictions import TASK_FILE, Prediction, PredictionFile, fingerprint
from unclipped.evaluation.questions import Images, answers_in, as_prompt, gold_of, open_task, record, with_images_as
from unclipped.evaluation.results import Comparison, TaskResult, compare, score_prediction, summarise
from unclipped.evaluation.scorers import build_scorer
from unclipped.evaluation.tables import print_result

if TYPE_CHECKING:
    from unclipped.inference.engine import Engine

RESULTS_FILE = "results.json"
TASK_RESULT_FILE = "result.json"
_BATCHES_BETWEEN_WRITES = 8


@dataclass(frozen=True)
class EvaluationResult:
    """Results of all tasks; `blind` and `differences` (model minus blind) when the blind arm was asked for."""

    model: dict[str, TaskResult]
    blind: dict[str, TaskResult] = field(default_factory=dict)
    differences: dict[str, Comparison] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: {"model" | "blind": {task: …}, "differences": {"blind": {task: …}}}."""
        arms: dict[str, Any] = {"model": {name: result.to_dict() for name, result in self.model.items()}}
        if self.blind:
            arms["blind"] = {name: result.to_dict() for name, result in self.blind.items()}
            arms["differences"] = {"blind": {name: row.to_dict() for name, row in self.differences.items()}}
        return arms


def default_console() -> Console:
    """The terminal, or a log of 120 columns."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own; the usual 80 columns would break tables
    return console


def evaluate(
    engine: Engine,
    task: TaskConfig,
    output_dir: str | Path,
    *,
    images: Images = "kept",
    blind: bool = False,
    resume: bool = True,
    batch_size: int = 64,
    config: EvaluationConfig | None = None,
    console: Console | None = None,
) -> TaskResult:
    """Ask the questions of one task and score the answers; `output_dir` keeps predictions.jsonl and result.json.

    blind: the same as images="removed". config: settings of the intervals. With `resume` answers that are there already
    are taken over, if they came from this model, these settings and the same data files. Raises DataError for an empty
    task or a sample without gold answer, UsageError for a folder with predictions of something else.
    """
    config = config or EvaluationConfig()
    console = console or default_console()
    images = "removed" if blind else images
    source = open_task(task)
    asked = task.model_dump(include=set(_ASKED), mode="json")
    identity = fingerprint({"model": engine.fingerprint(), "images": images, **asked})
    known = None if task.unseen_answers_of is None else answers_in(task.unseen_answers_of)
    file = PredictionFile(output_dir)
    check_inputs(file.folder, [task.source, task.unseen_answers_of], resume=resume and file.path.exists())
    settings = {"images": images, "task": task.model_dump(mode="json"), "evaluation": _interval_settings(config)}
    done = file.begin(settings, identity, resume=resume)
    finished = {prediction.index for prediction in done}
    total = source.length or 0
    if not finished <= set(range(total)):
        raise DataError(
            f"{file.path}: holds item {max(finished)} where {source.name} has {total:,}; remove the folder and "
            "evaluate again"
        )
    todo = [index for index in range(total) if index not in finished]
    if finished and todo:
        console.print(f"task {task.name}: {len(finished)} answers are there already, {len(todo)} to go", markup=False)
    scorer = build_scorer(task.scorer, task.scorer_options)
    for index in todo:  # what cannot be read, asked or scored is found before the model works
        sample = source[index]
        gold_of(sample, task)
        as_prompt(sample, task)
    began = time.monotonic()
    title = task.name if images == "kept" else f"{task.name} (images {images})"
    with counting(title, total, len(finished), console) as counter:
        for start in range(0, len(todo), batch_size * _BATCHES_BETWEEN_WRITES):
            indices = todo[start : start + batch_size * _BATCHES_BETWEEN_WRITES]
            samples = [source[index] for index in indices]
            prompts = [with_images_as(as_prompt(s, task), images, engine.processor.image_processor) for s in samples]
            refused: dict[int, str] = {}
            answers = engine.generate(
                prompts,
                max_new_tokens=task.max_new_tokens,
                batch_size=batch_size,
                on_progress=counter.advance,
                on_too_long=refused.__setitem__,
            )
            rows = [
                record(index, sample, task, answer, known, refused.get(number))
                for number, (index, sample, answer) in enumerate(zip(indices, samples, answers, strict=True))
            ]
            rows = [replace(row, score=score_prediction(scorer, row, task.name).value) for row in rows]
            file.append(rows)
            done += rows
    done.sort(key=lambda prediction: prediction.index)
    result = summarise(done, task, config, images=images, seconds=round(time.monotonic() - began, 3) if todo else None)
    write_json(file.folder / TASK_RESULT_FILE, result.to_dict())
    return result


_ASKED = ("source", "limit", "max_new_tokens", "prompt_prefix", "prompt_suffix", "unseen_answers_of")
"""Task fields that change what the predictions hold; scorers do not."""


def _interval_settings(config: EvaluationConfig) -> dict[str, Any]:
    return config.model_dump(include={"interval", "bootstrap_samples", "confidence", "seed"}, mode="json")


def evaluate_model(
    model: Any,
    config: EvaluationConfig,
    output: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> EvaluationResult:
    """Run all tasks of `config` on a model folder (or an Engine) and write OUTPUT/results.json.

    Predictions stand in OUTPUT/predictions/TASK, those without images in OUTPUT/predictions-blind/TASK. Under
    `config.sparse` OUTPUT/sparse.json says what the layers did at the last prefill. Raises UsageError when there is no
    task.
    """
    from unclipped.inference.engine import Engine

    if not config.tasks:
        raise UsageError("evaluation: no tasks; name at least one under evaluation.tasks")
    console = console or default_console()
    engine = model if isinstance(model, Engine) else Engine(model, device=device, sparse=config.sparse)
    output = Path(output)
    model_results: dict[str, TaskResult] = {}
    blind_results: dict[str, TaskResult] = {}
    differences: dict[str, Comparison] = {}
    for task in config.tasks:
        options: dict[str, Any] = {
            "resume": resume, "batch_size": config.batch_size, "config": config, "console": console,
        }  # fmt: skip
        folder = predictions_folder(output, task.name)
        model_results[task.name] = evaluate(engine, task, folder, images=config.images, **options)
        if config.blind:
            blind_folder = predictions_folder(output, task.name, blind=True)
            blind_results[task.name] = evaluate(engine, task, blind_folder, blind=True, **options)
            differences[task.name] = compare_folders(folder, blind_folder, task, config)
        print_result(console, model_results[task.name], blind_results.get(task.name), differences.get(task.name))
    result = EvaluationResult(model_results, blind_results, differences)
    summary = engine.sparse.summary() if engine.sparse is not None else None
    if summary is not None:
        why = f"; dense because {', '.join(summary.reasons)}" if summary.reasons else ""
        console.print(
            f"last prefill under {summary.pattern}: {summary.sparse_layers} of {summary.layers} layers sparse, density "
            f"{summary.density:.2f}{why}",
            markup=False,
        )
        write_json(output / "sparse.json", asdict(summary))
    write_json(output / RESULTS_FILE, result.to_dict())
    return result


def predictions_folder(output: str | Path, task: str, *, blind: bool = False) -> Path:
    """Where `evaluate_model` keeps a task's predictions."""
    return Path(output) / ("predictions-blind" if blind else "predictions") / task


def read_predictions(folder: str | Path) -> list[Prediction]:
    """The predictions kept in a task's folder, in the order of its source. Raises DataError when there are none."""
    file = PredictionFile(folder)
    found = file.read()
    if not found:
        raise DataError(f"{file.path}: no predictions to score; remove the folder and evaluate again")
    return found


def compare_folders(
    first: str | Path, second: str | Path, task: TaskConfig, config: EvaluationConfig | None = None
) -> Comparison:
    """Paired difference, first minus second, of two folders of predictions on the same items."""
    return compare(read_predictions(first), read_predictions(second), task, config or EvaluationConfig())


def rescore(
    output: str | Path,
    *,
    scorer: str | None = None,
    scorer_options: dict[str, Any] | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Score kept predictions anew, without a model, and rewrite result.json and results.json.

    output: the folder of an evaluation, or of one task. scorer: a rule in place of the one that the task named.
    Raises DataError when there are no predictions, or when a task was interrupted before its last item.
    """
    output, console = Path(output), console or default_console()
    folders = sorted(path.parent for path in output.rglob(TASK_FILE))
    if not folders:
        raise DataError(f"{output}: no predictions below this folder (expected {TASK_FILE} beside predictions.jsonl)")
    for folder in folders:
        if not (folder / TASK_RESULT_FILE).exists():  # it is written after the last item
            raise DataError(f"{folder}: the evaluation was interrupted before its end; finish it with --resume first")
    model_results: dict[str, TaskResult] = {}
    blind_results: dict[str, TaskResult] = {}
    differences: dict[str, Comparison] = {}
    for folder in folders:
        task, config, images = settings_of(PredictionFile(folder), scorer, scorer_options)
        result = summarise(read_predictions(folder), task, config, images=images)
        write_json(folder / TASK_RESULT_FILE, result.to_dict())
        is_blind = folder.parent.name == "predictions-blind"
        (blind_results if is_blind else model_results)[task.name] = result
        if is_blind:
            sighted = predictions_folder(folder.parent.parent, task.name)
            differences[task.name] = compare_folders(sighted, folder, task, config)
    for name, result in (model_results or blind_results).items():
        print_result(console, result, blind_results.get(name) if model_results else None, differences.get(name))
    found = EvaluationResult(model_results, blind_results, differences)
    if (output / RESULTS_FILE).exists() or (output / "predictions").is_dir():
        write_json(output / RESULTS_FILE, found.to_dict())
    return found


def settings_of(
    file: PredictionFile, scorer: str | None = None, options: dict[str, Any] | None = None
) -> tuple[TaskConfig, EvaluationConfig, str]:
    """Task, settings of the intervals and what was seen of the images, as the predictions were made.

    scorer: a rule in place of the task's. Raises DataError when the file beside the predictions cannot be read.
    """
    from pydantic import ValidationError

    settings = file.settings()
    try:
        task = TaskConfig.model_validate(settings["task"])
        config = EvaluationConfig.model_validate(settings["evaluation"])
    except (KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file.task_path}: not the settings of an evaluated task ({reason}); evaluate again") from None
    if scorer is not None:
        others = {name: kept for name, kept in task.extra_scorers.items() if name != scorer}
        task = task.model_copy(
            update={"scorer": scorer, "scorer_options": dict(options or {}), "extra_scorers": others}
        )
        build_scorer(task.scorer, task.scorer_options)
    return task, config, str(settings.get("images", "kept"))
