"""Every real set can be asked and scored: gold as prediction is perfect, an empty prediction is not."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from unclipped.data.sample import Sample
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.runner import evaluate
from unclipped.inference.engine import Engine

SETS: dict[str, dict[str, Any]] = {
    "nlvr": {"source": {"source": "nlvr", "cluster": r"^dev-(\d+)-"}},
    "sroie-lines": {
        "source": {"source": "sroie/val_lines.jsonl", "cluster": r"^sroie-line-(\d+)-"},
        "scorer": "character_error_rate",
        "scorer_options": {"case_sensitive": False},
        "extra_scorers": {"exact_match": {}},
        "unseen_answers_of": {"source": "sroie/train_lines.jsonl"},
    },
    "sroie-fields": {"source": {"source": "sroie/val_fields.jsonl", "cluster": r"^sroie-(\d+)-"}, "scorer": "anls"},
    "tabmwp-lookups": {"source": {"source": "tabmwp/val_lookup.jsonl", "cluster": r"^tabmwp-(\d+)-"}},
    "tabmwp": {"source": {"source": "tabmwp"}},
    "chartqa": {"source": {"source": "chartqa"}, "scorer": "relaxed_accuracy"},
    "clothing": {"source": {"source": "clothing"}, "scorer": "multiple_choice"},
    "bccd": {"source": {"source": "bccd", "cluster": r"^(bccd-\w+Image_\d+)-"}},
}


class Gold(Engine):
    """Says the gold answers in order, or nothing."""

    def __init__(self, says: str | None = None) -> None:
        self.says = says
        self.processor = SimpleNamespace(image_processor=None)

    def fingerprint(self) -> str:
        return "gold"

    def generate(self, requests: Any, **options: Any) -> list[str]:
        return [self.says if self.says is not None else _gold(request) for request in requests]


def _gold(sample: Sample) -> str:
    return sample.answers[0]


@pytest.mark.parametrize("name", SETS)
def test_gold_is_perfect_and_silence_is_not(data_folder: Path, tmp_path: Path, name: str) -> None:
    fields = {key: value for key, value in SETS[name].items() if key != "unseen_answers_of"}
    if "unseen_answers_of" in SETS[name]:
        unseen = SETS[name]["unseen_answers_of"]
        fields["unseen_answers_of"] = unseen | {"source": str(data_folder / unseen["source"])}
    source = fields["source"] | {"source": str(data_folder / fields["source"]["source"]), "split": "val"}
    task = TaskConfig(**(fields | {"name": name, "source": source}))
    options: dict[str, Any] = {
        "config": EvaluationConfig(bootstrap_samples=100), "console": Console(file=io.StringIO())
    }  # fmt: skip
    right = evaluate(Gold(), task, tmp_path / "right", **options)
    assert right.overall.value == (1.0 if right.higher_is_better else 0.0)
    assert right.num_unparsed == 0
    if "cluster" in source:
        assert right.overall.clusters < right.overall.count
    silent = evaluate(Gold(""), task, tmp_path / "silent", **options)
    assert silent.overall.value == (0.0 if right.higher_is_better else 1.0)
    if name == "sroie-lines":
        assert right.groups["unseen_answers"].overall.count == 594
        assert right.extra["exact_match"].overall.value == 1.0
