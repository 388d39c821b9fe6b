"""The steps of the quickstart: language model, measured pace, recipe with its steps, experiment, next commands."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import typer

from unclipped.cli.record import record_run
from unclipped.recipes.schema import PretrainRecipe, TrainRecipe
from unclipped.recipes.validation import load_recipe, to_yaml
from unclipped.studies.arms import makespan, threads_each
from unclipped.studies.experiment import arms_of, run_experiment
from unclipped.training.pretrain import pretrain
from unclipped.training.run import train_stages

# Share of the time that training may take by the measured pace. The rest is for evaluation and the report, and because
# arms side by side are slower than the one alone that was measured.
TRAINING_SHARE = 0.85
PROBE_STEPS = 12
DEFAULT_MINUTES = 8.5
# The default never takes fewer steps: 755 taught no reading, 1,374 did (benchmarks/results/quickstart.md).
ENOUGH_STEPS = 1300


def run(output: Path, *, minutes: float | None, overrides: list[str], resume: bool) -> None:
    """Run or resume the quickstart in `output`. Overrides that begin with `language_model.` go to its recipe."""
    started = time.perf_counter()
    language_model = output / "language-model"
    prefix = "language_model."
    text_overrides = [override.removeprefix(prefix) for override in overrides if override.startswith(prefix)]
    overrides = [override for override in overrides if not override.startswith(prefix)]
    text = load_recipe("quickstart-lm", PretrainRecipe, text_overrides)
    path, folder = output / "recipe.yaml", str(language_model / "model")
    is_measured = resume and path.is_file()
    if is_measured:
        config = load_recipe(str(path), TrainRecipe, overrides)
    else:  # read before anything is trained, so that a mistyped override shows at once
        parts = {"text": folder, "vision.llm": folder}  # as JSON, since a folder's name may mean something in YAML
        own = [f"model.{part}={json.dumps(value, ensure_ascii=False)}" for part, value in parts.items()]
        config = load_recipe("quickstart", TrainRecipe, [*own, *overrides])
    typer.echo("1/3  a text-only language model, from generated text")
    pretrain(text, language_model, resume=resume)
    pretraining_seconds = time.perf_counter() - started

    if not is_measured and not any(override.startswith("stages") for override in overrides):
        typer.echo("2/3  measuring the pace of this machine")
        seconds = 60 * (minutes or DEFAULT_MINUTES) * TRAINING_SHARE - (time.perf_counter() - started)
        step_seconds = makespan(seconds_per_step(config, output), config.arms_at_once)
        wanted = int(seconds / step_seconds)
        if minutes is None and wanted < ENOUGH_STEPS:
            typer.echo(
                f"     {DEFAULT_MINUTES:g} minutes give {wanted} steps here and reading needs about {ENOUGH_STEPS}: "
                f"this takes about {ENOUGH_STEPS * step_seconds / 60 / TRAINING_SHARE:.0f} minutes (--minutes N limits)"
            )
            wanted = ENOUGH_STEPS
        config = with_steps(config, max(60, wanted))
    steps = sum(stage.steps for stage in config.stages)
    typer.echo(f"3/3  {1 + len(config.baselines)} arms of {steps} steps each; the recipe is {path}")
    record_run(config, output, resume=resume)
    chat = f"unclipped chat {output / 'model'} {output / 'examples' / '1.png'} -q 'number?'"
    commands = [
        ("ask the model about a test image", chat),
        ("talk with it", f"unclipped chat {output / 'model'} {output / 'examples' / '1.png'}"),
        (
            "train the same recipe on your own folder (train.jsonl, val.jsonl, images)",
            f"unclipped train {path} data.sources='[{{source: ./my-folder}}]' "
            "evaluation.tasks='[{name: mine, source: {source: ./my-folder, split: val}}]' "
            "stages='[{name: all, train: {vision: 1e-3, connector: 1e-3, text: 1e-3}, steps: 2000}]' "
            "--output runs/mine",
        ),
    ]
    run_experiment(
        config,
        output,
        resume=resume,
        extra_times={"language model": pretraining_seconds},
        next_commands=commands,
        title="Unclipped quickstart",
        recipe_text=to_yaml(config),
        say=typer.echo,
    )
    typer.echo(f"\nfinished after {(time.perf_counter() - started) / 60:.1f} min")
    typer.echo(f"report:  {output / 'report.html'}\nfigures: {output / 'results.json'}\nmodel:   {output / 'model'}\n")
    for what, command in commands:
        typer.echo(f"{what}:\n  {command}")


def with_steps(config: TrainRecipe, total: int) -> TrainRecipe:
    """The recipe with its stages stretched to `total` steps, their proportions and warm-up shares kept."""
    before = sum(stage.steps for stage in config.stages)
    stages = []
    for stage in config.stages:
        steps = max(2, round(stage.steps * total / before))
        warmup = min(stage.warmup_steps, steps // 4)
        stages.append(stage.model_copy(update={"steps": steps, "warmup_steps": warmup}))
    return config.model_copy(update={"stages": tuple(stages)})


def seconds_per_step(config: TrainRecipe, output: Path) -> list[float]:
    """Seconds of one training step of each arm, measured on a few steps of its last stage that are thrown away."""
    from unclipped.models.assemble import assemble

    paces = []
    for arm in arms_of(config, output):
        model, processor, _ = assemble(arm.config.model, seed=0)
        stage = arm.config.stages[-1].model_copy(update={"steps": PROBE_STEPS, "warmup_steps": 0})
        threads = threads_each(config.arms_at_once)
        training = arm.config.training.model_copy(update={"log_every_steps": 4, "threads": threads})
        with tempfile.TemporaryDirectory() as folder:
            result = train_stages(model, processor, [stage], training, arm.config.data, folder)
            rates = result.record["stages"][0]["samples_per_second"]
        paces.append(stage.batch_size / rates["median"])
    return paces
