"""One experiment: the model and its baselines trained alike, evaluated on the same items, reported side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unclipped.core.documents import read_json
from unclipped.core.errors import UnclippedError
from unclipped.core.files import write_json
from unclipped.data.config import DataConfig
from unclipped.data.inputs import check_inputs
from unclipped.data.sources import open_source, open_sources
from unclipped.data.statistics import pixel_statistics
from unclipped.evaluation.questions import open_task
from unclipped.evaluation.runner import compare_folders, evaluate_model, predictions_folder
from unclipped.studies.arms import run_side_by_side
from unclipped.studies.config import Arm, ExperimentConfig
from unclipped.studies.summary import figures_of, rows_of, write_experiment_report
from unclipped.training.record import check_record

ARM_FILE = "arm.json"


def arms_of(config: ExperimentConfig, output: Path) -> list[Arm]:
    """The model's arm and one for each baseline; each baseline differs from the model in exactly one thing."""
    arms = [Arm("model", config, output)]
    for name in config.baselines:
        changed = blind(config) if name == "blind" else random_encoder(config)
        arms.append(Arm(name, changed, output / "baselines" / name))
    return arms


def blind(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment without its images, in training and test."""

    def hide(data: DataConfig) -> DataConfig:
        return data.model_copy(update={"blind": config.blind_image})

    stages = tuple(
        stage if stage.data is None else stage.model_copy(update={"data": hide(stage.data)}) for stage in config.stages
    )
    evaluation = config.evaluation.model_copy(update={"images": config.blind_image, "blind": False})
    return config.model_copy(update={"data": hide(config.data), "stages": stages, "evaluation": evaluation})


def random_encoder(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment with fresh weights in its encoder."""
    return config.model_copy(update={"model": config.model.model_copy(update={"random_vision": True})})


def run_experiment(
    config: ExperimentConfig,
    output: Path,
    *,
    resume: bool = False,
    extra_times: dict[str, float] | None = None,
    next_commands: Sequence[tuple[str, str]] = (),
    title: str = "Unclipped: training report",
    recipe_text: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and evaluate every arm, then write results.json, differences.json (model minus baseline on the same items)
    and report.html into `output`; returns the results.

    An arm that is finished already is taken as it is when `resume` is set. Raises what assembly, training and
    evaluation raise.
    """
    from unclipped.training.device import world

    rank, _ = world()
    open_inputs(config)
    arms = arms_of(config, output)
    records: dict[str, dict[str, Any]] = {}
    if config.arms_at_once > 1 and len(arms) > 1:
        by_name = {arm.name: arm for arm in arms}
        todo = {arm.name: arm.folder for arm in arms if not (resume and is_done(arm))}
        run_side_by_side(todo, partial(_run_named, by_name, resume), at_once=config.arms_at_once, say=say)
        records = {arm.name: read_arm(arm.folder) for arm in arms}
        arms_left: list[Arm] = []
    else:
        arms_left = arms
    for arm in arms_left:
        if len(arms) > 1 and rank == 0:
            say(f"\n== {arm.name} ({1 + len(records)} of {len(arms)}) ==")
        records[arm.name] = run_arm(arm, resume=resume, is_first=rank == 0)
    if rank != 0:  # one process evaluates and writes; the others only trained
        return {}
    results = rows_of(figures_of(arms))
    write_json(output / "results.json", results)
    differences = _differences(arms)
    write_json(
        output / "differences.json",
        {arm: {task: found.to_dict() for task, found in tasks.items()} for arm, tasks in differences.items()},
    )
    write_experiment_report(
        config,
        arms,
        records,
        differences=differences,
        title=title,
        recipe_text=recipe_text,
        extra_times=extra_times or {},
        next_commands=next_commands,
        path=output / "report.html",
    )
    return results


def _run_named(arms: dict[str, Arm], resume: bool, name: str) -> None:
    run_arm(arms[name], resume=resume, is_first=True)


def open_inputs(config: ExperimentConfig) -> None:
    """Open all that later parts of the run read: a wrong path must show before the first step, not after the last.

    Raises UsageError and DataError as the sources do.
    """
    for data in (config.data, *(stage.data for stage in config.stages)):
        if data is not None:
            open_sources(data, seed=config.training.seed)
    for source in config.held_out_text:
        open_source(source, seed=config.training.seed)
    for task in config.evaluation.tasks:
        open_task(task)
        if task.unseen_answers_of is not None:
            open_source(task.unseen_answers_of)


def is_done(arm: Arm) -> bool:
    """Whether an arm was trained and evaluated before, from the data and models that are there now.

    Raises UsageError when these have changed since.
    """
    if not (arm.folder / ARM_FILE).exists():
        return False
    check_inputs(arm.folder, arm.config, resume=True)
    return True


def read_arm(folder: Path) -> dict[str, Any]:
    """What `run_arm` wrote about a finished arm. Raises UnclippedError when it is damaged."""
    path = folder / ARM_FILE
    remedy = "remove it, and the arm is evaluated again"
    record = read_json(path, error=UnclippedError, remedy=remedy)
    seconds = [record.get("training_seconds"), record.get("evaluation_seconds", 0.0)]
    if not isinstance(record.get("training"), dict) or not all(isinstance(found, int | float) for found in seconds):
        raise UnclippedError(f"{path}: not the record of a finished arm; {remedy}")
    check_record(record["training"], path)
    return record


def run_arm(arm: Arm, *, resume: bool, is_first: bool) -> dict[str, Any]:
    """Train and evaluate one arm in its folder; returns what was done and how long it took."""
    if is_first:
        check_inputs(arm.folder, arm.config, resume=resume)
    if resume and is_done(arm):
        return read_arm(arm.folder)
    from unclipped.inference.engine import Engine
    from unclipped.models.assemble import assemble, set_pixel_statistics
    from unclipped.training.run import train_stages

    model, processor, report = assemble(arm.config.model, seed=arm.config.training.seed)
    if arm.config.pixel_statistics == "data":
        data = arm.config.stages[0].data or arm.config.data
        sources = open_sources(data, seed=arm.config.training.seed)
        set_pixel_statistics(processor, *pixel_statistics(sources, processor, seed=arm.config.training.seed))
    arm.folder.mkdir(parents=True, exist_ok=True)
    if is_first:
        write_json(arm.folder / "assembly.json", report.to_dict())
    trained = train_stages(
        model,
        processor,
        arm.config.stages,
        arm.config.training,
        arm.config.data,
        arm.folder,
        resume=resume,
        held_out=_held_out(arm.config, processor),
    )
    record: dict[str, Any] = {"training": trained.record, "training_seconds": trained.seconds}
    if not is_first:
        return record
    if arm.config.evaluation.tasks:
        engine = Engine(
            str(trained.model_folder), device=arm.config.training.device, sparse=arm.config.evaluation.sparse
        )
        found = evaluate_model(engine, arm.config.evaluation, arm.folder / "evaluation", resume=resume)
        record["evaluation"] = found.to_dict()["model"]
        record["evaluation_seconds"] = sum(result.seconds or 0.0 for result in found.model.values())
    write_json(arm.folder / ARM_FILE, record)
    return record


def _held_out(config: ExperimentConfig, processor: Any) -> Any:
    if not config.held_out_text:
        return None
    from unclipped.training.text import held_out_blocks

    return held_out_blocks(
        config.held_out_text, processor, config.held_out_blocks, length=config.held_out_length,
        seed=config.training.seed,
    )  # fmt: skip


def _differences(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """{baseline: {task: paired differences, model minus baseline}}."""
    model, *baselines = arms
    return {
        arm.name: {
            task.name: compare_folders(
                predictions_folder(model.folder / "evaluation", task.name),
                predictions_folder(arm.folder / "evaluation", task.name),
                task,
                model.config.evaluation,
            )
            for task in model.config.evaluation.tasks
        }
        for arm in baselines
    }
