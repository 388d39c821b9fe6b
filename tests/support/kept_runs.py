"""Run folders as an evaluation leaves them, from answers written out in a test: no model is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unclipped.core.files import write_json
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.predictions import Prediction, PredictionFile
from unclipped.evaluation.results import score_prediction, summarise
from unclipped.evaluation.scorers import build_scorer

FAST = EvaluationConfig(bootstrap_samples=200)


def items(count: int, **fields: Callable[[int], Any]) -> list[Prediction]:
    """Items 0 … count − 1, asked for their number modulo 7 and rightly answered; `fields` change them by number."""
    plain = [Prediction(i, f"item-{i}", f"what is {i}?", (str(i % 7),), str(i % 7)) for i in range(count)]
    return [replace(row, **{name: of(row.index) for name, of in fields.items()}) for row in plain]


def keep(
    folder: Path,
    tasks: Mapping[str, Sequence[Prediction]],
    *,
    config: EvaluationConfig = FAST,
    images: str = "kept",
    place: str = "predictions",
    **fields: Any,
) -> Path:
    """Write an evaluation of these tasks; `fields` are further ones of each task; -> the folder."""
    results = {}
    for name, rows in tasks.items():
        task = TaskConfig(**({"name": name, "source": {"source": "my-folder", "split": "val"}} | fields))
        file = PredictionFile(folder / place / name)
        settings = config.model_dump(include={"interval", "bootstrap_samples", "confidence", "seed"}, mode="json")
        file.begin({"images": images, "task": task.model_dump(mode="json"), "evaluation": settings}, "a", resume=False)
        scorer = build_scorer(task.scorer, task.scorer_options)
        file.append(replace(row, score=score_prediction(scorer, row, name).value) for row in rows)
        results[name] = summarise(rows, task, config, images=images).to_dict()
        write_json(file.folder / "result.json", results[name])
    write_json((folder / place).parent / "results.json", {"model": results})
    return folder
