"""A comparison of pretraining objectives: every encoder pretrained, probed, and joined to the same language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclipped.audit.results import RESULTS_FILE, read_probes
from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import write_json
from unclipped.data.inputs import check_inputs
from unclipped.evaluation.figures import read_figure
from unclipped.evaluation.runner import compare_folders, predictions_folder
from unclipped.studies.arms import run_side_by_side
from unclipped.studies.comparison_config import BLIND, LLM_INIT, RANDOM, ComparisonConfig
from unclipped.studies.config import Arm
from unclipped.studies.experiment import blind, is_done, open_inputs, random_encoder, run_arm
from unclipped.studies.summary import figures_of, rows_of, task_figures
from unclipped.training.progress import read_metrics
from unclipped.training.record import finished_record, read_record, verify_model

if TYPE_CHECKING:
    from unclipped.encoders.spec import EncoderSpec

RESULTS = "comparison.json"


@dataclass(frozen=True)
class _Folders:
    """Where a comparison keeps what it makes."""

    output: Path

    def encoder(self, arm: str) -> Path:
        return self.output / "encoders" / arm

    def model(self, arm: str) -> str:
        return str(self.encoder(arm) / "model")

    def probe(self, arm: str, probe: str) -> Path:
        return self.output / "probes" / arm / probe

    def vlm(self, arm: str) -> Path:
        return self.output / "vlm" / arm


def run_comparison(
    config: ComparisonConfig,
    output: str | Path,
    *,
    resume: bool = False,
    title: str = "Pretraining objectives compared",
    recipe_text: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Pretrain, probe and train every arm; write comparison.json and report.html into `output`; return the results.

    With `resume`, what is finished is taken as it is and what was interrupted goes on. Raises what pretraining,
    evaluation, assembly and training raise; UsageError when the arms' encoders differ in architecture.
    """
    from unclipped.studies.comparison_report import write_comparison_report

    folders = _Folders(Path(output))
    if config.vlm is not None:
        open_inputs(config.experiment("later", is_baseline=False))
    for names in config.waves():
        todo = {name: folders.encoder(name) for name in names if not (resume and _is_pretrained(config, folders, name))}
        _run("pretraining", todo, partial(_pretrain, config, folders, resume), config, say)
    _check_architectures(config, folders)
    probes = {f"{arm} {probe}": folders.probe(arm, probe) for arm in config.arms for probe in config.probes}
    todo = {name: path for name, path in probes.items() if not (resume and _is_probed(config, folders, name))}
    _run("probes", todo, partial(_probe, config, folders), config, say)
    arms = _vlm_arms(config, folders)
    todo = {arm.name: arm.folder for arm in arms if not (resume and is_done(arm))}
    _run("models", todo, partial(_train, {arm.name: arm for arm in arms}, resume), config, say)
    results = _results(config, folders, arms)
    write_json(folders.output / RESULTS, results)
    write_comparison_report(
        folders.output / "report.html", results, title=title, description=config.description, recipe_text=recipe_text
    )
    return results


def _run(
    what: str, todo: dict[str, Path], run: Callable[[str], Any], config: ComparisonConfig, say: Callable[[str], None]
) -> None:
    if not todo:
        return
    say(f"\n== {what}: {', '.join(todo)} ==")
    if config.arms_at_once > 1 and len(todo) > 1:
        run_side_by_side(todo, run, at_once=config.arms_at_once, say=say)
        return
    for name in todo:
        say(f"\n{name}")
        run(name)


def _is_pretrained(config: ComparisonConfig, folders: _Folders, name: str) -> bool:
    record = read_record(folders.encoder(name) / "training.json")
    if record is None or not record["finished"]:
        return False
    verify_model(folders.encoder(name), record)
    check_inputs(folders.encoder(name), config.pretraining(name, folders.output / "encoders"), resume=True)
    return True


def _is_probed(config: ComparisonConfig, folders: _Folders, name: str) -> bool:
    arm, probe = name.split(" ", maxsplit=1)
    folder = folders.probe(arm, probe)
    if not (folder / RESULTS_FILE).exists():
        return False
    check_inputs(folder, config.probe(probe, folders.model(arm), is_baseline=True), resume=True)
    return True


def _pretrain(config: ComparisonConfig, folders: _Folders, resume: bool, name: str) -> None:
    from unclipped.studies.pretraining_report import write_pretraining_report
    from unclipped.training.pretrain import pretrain

    arm = config.pretraining(name, folders.output / "encoders")
    pretrain(arm, folders.encoder(name), resume=resume)
    write_pretraining_report(arm, folders.encoder(name), title=f"Pretraining: {name}")


def _spec(folder: str) -> EncoderSpec:
    """Facts of a saved encoder."""
    from unclipped.encoders.build import load_encoder

    return load_encoder(folder, baseline=True)[0].spec


def _is_student(config: ComparisonConfig, folders: _Folders, name: str) -> bool:
    return config.pretraining(name, folders.output / "encoders").objective == "distill"


def _check_architectures(config: ComparisonConfig, folders: _Folders) -> None:
    """Raise UsageError unless all arms trained encoders of one width, depth, patch and image side."""
    from unclipped.encoders.build import load_encoder

    found: dict[str, tuple[Any, ...]] = {}
    for name in config.arms:
        if _is_student(config, folders, name):
            continue  # a student may be smaller than its teacher on purpose
        encoder, _ = load_encoder(folders.model(name), baseline=True)
        fields: Any = encoder.model.config
        depth = getattr(getattr(fields, "text_config", fields), "num_hidden_layers", None)
        found[name] = (encoder.spec.hidden_size, depth, encoder.spec.patch_size, encoder.spec.image_size)
    if len(set(found.values())) > 1:
        listed = "; ".join(f"{name} {shape}" for name, shape in found.items())
        raise UsageError(
            f"arms: their encoders differ in (width, depth, patch, image side): {listed}; give one shape under pretrain"
        )


def _probe(config: ComparisonConfig, folders: _Folders, name: str) -> None:
    from unclipped.audit.runner import evaluate_encoder

    arm, probe = name.split(" ", maxsplit=1)
    folder = folders.model(arm)
    settings = config.probe(probe, folder, is_baseline=_spec(folder).needs_baseline_flag)
    check_inputs(folders.probe(arm, probe), settings, resume=False)
    evaluate_encoder(settings, folders.probe(arm, probe))


def _vlm_arms(config: ComparisonConfig, folders: _Folders) -> list[Arm]:
    """One model for each encoder, then the random, the blind and the LLM-initialised one."""
    if config.vlm is None:
        return []
    arms = []
    for name in config.arms:
        encoder = folders.model(name)
        made = config.experiment(encoder, is_baseline=_spec(encoder).needs_baseline_flag)
        arms.append(Arm(name, made, folders.vlm(name)))
    students = {name for name in config.arms if _is_student(config, folders, name)}
    control = next((arm.config for arm in arms if arm.name not in students), arms[0].config)
    arms.append(Arm(RANDOM, random_encoder(control), folders.vlm(RANDOM)))
    arms.append(Arm(BLIND, blind(control), folders.vlm(BLIND)))
    if config.llm_init is not None:
        made = config.experiment(f"llm:{config.llm_init}", is_baseline=False)
        arms.append(Arm(LLM_INIT, made, folders.vlm(LLM_INIT)))
    return arms


def _train(arms: dict[str, Arm], resume: bool, name: str) -> None:
    run_arm(arms[name], resume=resume, is_first=True)


def _results(config: ComparisonConfig, folders: _Folders, arms: list[Arm]) -> dict[str, Any]:
    """All figures as JSON: {"pretraining", "probes", "vlm", "vlm_overall", "vlm_minus_random", "vlm_minus_blind"}.

    "vlm" is by arm and category, "vlm_overall" by task and arm, the differences by arm and task.
    """
    pretraining: dict[str, Any] = {}
    for name in config.arms:
        metrics = folders.encoder(name) / "metrics.jsonl"
        if not (rows := read_metrics(metrics)):
            raise DataError(f"{metrics}: holds no row; start a new comparison in another --output")
        record = finished_record(folders.encoder(name))
        entries, healths = record["stages"], [row["health"] for row in rows if "health" in row]
        pretraining[name] = {
            "objective": config.pretraining(name, folders.output / "encoders").objective,
            "declared": _spec(folders.model(name)).objective,
            "samples": sum(entry["steps"] * entry["batch_size"] for entry in entries),
            "seconds": sum(entry["seconds"] for entry in entries),
            "samples_per_second": entries[-1]["samples_per_second"]["median"],
            "loss": [rows[0]["loss"], rows[-1]["loss"]],
            "rank": [healths[0]["rank"], healths[-1]["rank"]] if healths else None,
            "warnings": [warning for row in rows for warning in row.get("warnings", [])],
            "report": f"encoders/{name}/report.html",
        }
    probes: dict[str, Any] = {}
    for probe in config.probes:
        for arm in config.arms:
            for kind, rows in read_probes(folders.probe(arm, probe)).items():
                metric = rows["metric"]
                figures = [key for key, row in rows.items() if isinstance(row, dict) and metric in row]
                probes.setdefault(f"{probe}, {kind}", {})[arm] = {
                    "metric": metric,
                    **{key: read_figure(rows[key], metric).row() for key in figures},
                    "minus_random": rows["differences"].get("random_weights"),
                }
    by_name = {arm.name: arm for arm in arms}
    return {
        "pretraining": pretraining,
        "probes": probes,
        "vlm": rows_of(figures_of(arms)),
        "vlm_overall": rows_of(task_figures(arms)),
        "vlm_minus_random": _differences(arms, by_name.get(RANDOM)),
        "vlm_minus_blind": _differences(arms, by_name.get(BLIND)),
    }


def _differences(arms: list[Arm], control: Arm | None) -> dict[str, Any]:
    """{arm: {task: arm minus control over all items, paired}}."""
    if control is None:
        return {}
    found: dict[str, Any] = {}
    for arm in arms:
        if arm.name == control.name:
            continue
        for task in control.config.evaluation.tasks:
            compared = compare_folders(
                predictions_folder(arm.folder / "evaluation", task.name),
                predictions_folder(control.folder / "evaluation", task.name),
                task,
                control.config.evaluation,
            )
            found.setdefault(arm.name, {})[task.name] = compared.overall.to_dict()
    return found
