"""Fuzzing of run folders: any damage to any file is found when it is read, or changes nothing that is read from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz.mutations import changed, damaged, fuzz, outcome
from support.tiny_models import tiny_image, tiny_vlm
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.inputs import check_inputs, read_inputs
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.kept import read_task
from unclipped.evaluation.predictions import PredictionFile
from unclipped.evaluation.results import read_results
from unclipped.evaluation.runner import evaluate_model, rescore
from unclipped.inference.engine import Engine
from unclipped.training.checkpoint import latest_checkpoint, read_random_state, read_state, verify_checkpoint
from unclipped.training.config import StageConfig, TrainingConfig
from unclipped.training.interrupt import stop_this_process
from unclipped.training.progress import newest_metrics, read_metrics
from unclipped.training.record import check_record, read_record
from unclipped.training.run import train_stages


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one that was interrupted after its second step, and an evaluation."""
    from unclipped.objectives.answer import AnswerObjective
    from unclipped.training.interrupt import TrainingInterrupted

    folder = tmp_path_factory.mktemp("runs")
    tiny_image(16, 16).save(folder / "a.png")
    rows = [{"id": f"s{i}", "image": "a.png", "question": f"what {i}", "answer": str(i)} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(source=str(folder / "rows.jsonl"))
    model, processor, _ = tiny_vlm(folder / "parts")
    stage = StageConfig(name="all", train={"connector": 1e-3}, steps=3, batch_size=2)
    training = TrainingConfig(threads=1, device="cpu", log_every_steps=1, save_every_steps=1)
    train_stages(model, processor, [stage], training, DataConfig(sources=(source,)), folder / "done")
    after_step = AnswerObjective.after_step
    seen: list[int] = []

    def stop(self: AnswerObjective) -> None:
        after_step(self)
        seen.append(1)
        if len(seen) == 2:
            stop_this_process()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerObjective, "after_step", stop)
        with pytest.raises(TrainingInterrupted):
            train_stages(model, processor, [stage], training, DataConfig(sources=(source,)), folder / "cut")
    task = TaskConfig(name="mine", source=source, max_new_tokens=2)
    evaluate_model(
        Engine(model, processor, device="cpu"), EvaluationConfig(tasks=(task,), bootstrap_samples=100), folder / "eval"
    )
    return folder


def read_everything(folder: Path) -> dict[str, Any]:
    """What resuming, comparing and scoring again read of the runs."""
    position = latest_checkpoint(folder / "cut" / "checkpoints")
    assert position is not None
    assert verify_checkpoint(position), "without digests"
    predictions = folder / "eval" / "predictions" / "mine"
    record = read_record(folder / "done" / "training.json")
    assert record is not None
    return {
        "position": asdict(position),
        "state": read_state(position.folder),
        "random": read_random_state(position.folder, 0),
        "metrics": read_metrics(folder / "cut" / "metrics.jsonl"),
        "newest": newest_metrics(folder / "done" / "metrics.jsonl"),
        "record": check_record(record, folder / "done" / "training.json"),
        "inputs": [read_inputs(path) for path in sorted(folder.rglob("inputs.json"))],
        "predictions": PredictionFile(predictions).read(),
        "task": read_task(predictions),
        "results": read_results(folder / "eval" / "results.json"),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


@fuzz
@given(st.data())
def test_run_folders(runs: Path, data: st.DataObject) -> None:
    files = sorted(
        str(path.relative_to(runs))
        for name in ("cut", "done", "eval")
        for path in (runs / name).rglob("*")
        if path.is_file() and "model" not in path.parts
    )
    name = data.draw(st.sampled_from(files))
    path = runs / name
    content = path.read_bytes()
    structured = name.endswith(".json") and data.draw(st.booleans())
    new = json.dumps(data.draw(changed(json.loads(content)))).encode() if structured else data.draw(damaged(content))
    whole = read_everything(runs)
    try:
        path.write_bytes(new)
        found = outcome(lambda: read_everything(runs))
        if found is not None and "checkpoints/" in name:  # weights, random state, position: no change may pass
            assert same({key: found[key] for key in ("position", "state", "random")}, {
                key: whole[key] for key in ("position", "state", "random")
            })  # fmt: skip
        if name.startswith("eval"):
            copy = runs.with_name("rescored")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(runs / "eval", copy)
            outcome(lambda: rescore(copy))
        if name == "cut/inputs.json":
            source = SourceConfig(source=str(runs / "rows.jsonl"))
            outcome(lambda: check_inputs(runs / "cut", DataConfig(sources=(source,)), resume=True))
    finally:
        path.write_bytes(content)
