"""From the folders of finished arms to results.json and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unclipped.evaluation.figures import Difference, Figure
from unclipped.evaluation.predictions import Prediction
from unclipped.evaluation.questions import open_task
from unclipped.evaluation.results import Comparison, read_results
from unclipped.evaluation.runner import RESULTS_FILE, predictions_folder, read_predictions
from unclipped.evaluation.scorers import SCORERS
from unclipped.studies.config import Arm, ExperimentConfig
from unclipped.studies.environment import environment
from unclipped.studies.page import GalleryItem
from unclipped.studies.report import PartInfo, ReportData, StageInfo, write_report
from unclipped.training.progress import read_metrics

GALLERY_SIZE = 24


def _row_name(task: str, category: str, config: ExperimentConfig) -> str:
    """Name of a figure: the category, with its task in front when there are several tasks."""
    return category if len(config.evaluation.tasks) == 1 else f"{task}/{category}"


def figures_of(arms: Sequence[Arm]) -> dict[str, dict[str, Figure]]:
    """{arm: {category: figure}}."""
    return {
        arm.name: {
            _row_name(task, category, arm.config): Figure.read(row)
            for task, result in _evaluation(arm).items()
            for category, row in result["categories"].items()
        }
        for arm in arms
    }


def rows_of(figures: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, Any]]:
    """The same as results.json holds it: {arm: {category: {metric, "low", "high", "count"}}}."""
    return {outer: {inner: row.row() for inner, row in rows.items()} for outer, rows in figures.items()}


def _evaluation(arm: Arm) -> dict[str, Any]:
    """{task: result} of an arm; empty when nothing was evaluated."""
    path = arm.folder / "evaluation" / RESULTS_FILE
    return read_results(path)["model"] if path.exists() else {}


def write_experiment_report(
    config: ExperimentConfig,
    arms: Sequence[Arm],
    records: Mapping[str, Mapping[str, Any]],
    *,
    differences: Mapping[str, Mapping[str, Comparison]],
    title: str,
    recipe_text: str,
    extra_times: Mapping[str, float],
    next_commands: Sequence[tuple[str, str]],
    path: Path,
) -> None:
    """Write the report of a finished experiment to `path`, and some test images into `examples/` beside it."""
    gallery = _gallery(arms[0])
    _save_examples(gallery, path.parent / "examples", config)
    times = dict(extra_times)
    for name, record in records.items():
        times[f"training: {name}"] = record["training_seconds"]
        if "evaluation_seconds" in record:
            times[f"evaluation: {name}"] = record["evaluation_seconds"]
    evaluated = _evaluation(arms[0])
    data = ReportData(
        title=title,
        description=config.description,
        difficulty=config.difficulty,
        arms=figures_of(arms),
        overall=next(iter(task_figures(arms).values()), {}) if len(config.evaluation.tasks) == 1 else {},
        differences=_difference_rows(differences, config),
        groups=_groups(evaluated, config),
        curves={arm.name: _metrics(arm.folder / "metrics.jsonl") for arm in arms},
        stages=stage_rows({stage.name: {**stage.train} for stage in config.stages}, records["model"]["training"]),
        gallery=gallery,
        times=times,
        costs=_costs(records),
        environment=environment(),
        recipe=recipe_text,
        notes=_notes(config, records["model"]["training"]),
        next_commands=next_commands,
    )
    write_report(path, data)


def _metrics(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.exists() else []


def task_figures(arms: Sequence[Arm]) -> dict[str, dict[str, Figure]]:
    """{task: {arm: figure over all items of the task}}."""
    rows: dict[str, dict[str, Figure]] = {}
    for arm in arms:
        for task, result in _evaluation(arm).items():
            rows.setdefault(task, {})[arm.name] = Figure.read(result["overall"])
    return rows


def _difference_rows(
    differences: Mapping[str, Mapping[str, Comparison]], config: ExperimentConfig
) -> dict[str, dict[str, Difference]]:
    return {
        baseline: {
            _row_name(task, category, config): row
            for task, comparison in tasks.items()
            for category, row in comparison.categories.items()
        }
        for baseline, tasks in differences.items()
    }


def _groups(evaluated: Mapping[str, Any], config: ExperimentConfig) -> dict[str, dict[str, Figure]]:
    """{group: {category: figure}} of the model: held-out items, unseen answers, and their counterparts."""
    groups: dict[str, dict[str, Figure]] = {}
    for task, result in evaluated.items():
        for group, part in result["groups"].items():
            for category, row in part["categories"].items():
                groups.setdefault(group, {})[_row_name(task, category, config)] = Figure.read(row)
    return groups


def stage_rows(rates: Mapping[str, Mapping[str, float]], record: Mapping[str, Any]) -> list[StageInfo]:
    """The finished stages of a training record; `rates`: {stage: {part: learning rate}}."""
    stages = []
    for entry in record["stages"]:
        if "seconds" not in entry:
            continue
        text = entry.get("text_perplexity", {})
        stages.append(
            StageInfo(
                name=entry["name"],
                steps=entry["steps"],
                batch_size=entry["batch_size"],
                seconds=entry["seconds"],
                parts=[
                    PartInfo(part, row["total"], row["trainable"], rates[entry["name"]].get(part))
                    for part, row in entry["parameters"].items()
                ],
                perplexity_before=text.get("before", {}).get("perplexity"),
                perplexity_after=text.get("after", {}).get("perplexity"),
            )
        )
    return stages


def _costs(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    totals = [record["training"]["total"] for record in records.values()]
    return {
        "peak memory": f"{max(total['peak_memory_bytes'] for total in totals) / 2**30:.2f} GiB",
        "computation, all arms": f"{sum(total['flops'] for total in totals):.2e} FLOPs",
        "device-hours, all arms": f"{sum(total['device_hours'] for total in totals):.3f}",
    }


def _notes(config: ExperimentConfig, record: Mapping[str, Any]) -> list[str]:
    entries = [entry for entry in record["stages"] if "seconds" in entry]
    total = entries[-1]["parameters"]["all"]["total"]
    trained = max(entry["parameters"]["all"]["trainable"] for entry in entries)
    notes = [f"At most {trained:,} of {total:,} parameters are trained in a stage ({100 * trained / total:.2f} %)."]
    if config.baselines:
        notes.append("Every arm was trained with the same recipe, the same steps and the same seed; one seed was run.")
    if "blind" in config.baselines and config.blind_image == "blank":
        notes.append("The blind arm saw, in training and test, images of the mean colour in place of the real ones.")
    return notes


def _gallery(arm: Arm) -> list[GalleryItem]:
    """Right and wrong answers in turn, categories in turn; the same for the same predictions."""
    items: list[GalleryItem] = []
    tasks = arm.config.evaluation.tasks
    for task in tasks:
        higher_is_better = SCORERS.get(task.scorer).metric.higher_is_better
        source = open_task(task)
        predictions = read_predictions(predictions_folder(arm.folder / "evaluation", task.name))
        is_right = {
            prediction.index: (prediction.score or 0.0) >= 0.5 if higher_is_better else prediction.score == 0.0
            for prediction in predictions
        }
        for prediction in _in_turn(predictions, is_right, -(-GALLERY_SIZE // len(tasks))):
            images = source[prediction.index].images
            items.append(
                GalleryItem(
                    image=images[0].source if images else None,  # type: ignore[arg-type]
                    question=prediction.question,
                    answer=" | ".join(prediction.answers),
                    prediction=prediction.prediction,
                    is_right=is_right[prediction.index],
                    category=prediction.category,
                )
            )
    return items


def _in_turn(predictions: Sequence[Prediction], is_right: Mapping[int, bool], count: int) -> list[Prediction]:
    """`count` predictions that take categories, and right and wrong within each, in turn."""
    queues: dict[tuple[Any, bool], list[Prediction]] = {}
    for prediction in predictions:
        queues.setdefault((prediction.category, is_right[prediction.index]), []).append(prediction)
    chosen: list[Prediction] = []
    lanes = [queues[key] for key in sorted(queues, key=str)]
    depth = 0
    while len(chosen) < min(count, len(predictions)):
        chosen += [lane[depth] for lane in lanes if depth < len(lane)]
        depth += 1
    return chosen[:count]


def _save_examples(gallery: Sequence[GalleryItem], folder: Path, config: ExperimentConfig) -> None:
    """Images to try the chat command on: those of the wanted category and rightly answered ones first."""
    from unclipped.images.part import ImagePart
    from unclipped.images.prepare import decoded

    pictures = [(item.image, item) for item in gallery if item.image is not None]
    pictures.sort(key=lambda pair: (pair[1].category != config.chat_category, not pair[1].is_right))
    for number, (image, _) in enumerate(pictures[: config.chat_examples], start=1):
        folder.mkdir(parents=True, exist_ok=True)
        decoded(ImagePart(image)).save(folder / f"{number}.png")
