"""The comparison of objectives: equal terms, the order of arms, the whole run, and going on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparison_support import SHAPES, comparison
from pydantic import ValidationError

from support.tiny_models import tiny_lm
from unclipped.core.errors import UsageError
from unclipped.studies.comparison import run_comparison
from unclipped.studies.comparison_config import ComparisonConfig
from unclipped.studies.comparison_report import findings, limits

pytestmark = pytest.mark.slow


def test_arms_with_a_teacher_come_last_and_get_its_folder() -> None:
    config = ComparisonConfig(**comparison())
    assert config.waves() == [["contrastive"], ["student"]]
    student = config.pretraining("student", Path("out"))
    assert student.distill is not None
    assert student.distill.teacher == str(Path("out") / "contrastive" / "model")
    assert student.steps == config.pretraining("contrastive", Path("out")).steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"long": {"objective": "dinov2", "steps": 9}}},
            r"arms.long.steps: all arms are alike in it; set pretrain.steps",
        ),
        ({"arms": {"other": {"objective": "dinov2", "data": {}}}}, r"arms.other.data: all arms are alike"),
        ({"arms": {"blind": {"objective": "dinov2"}}}, r"arms.blind: expected letters.*no name of a baseline"),
        ({"arms": {"a/b": {"objective": "dinov2"}}}, r"arms.a/b: expected letters"),
        ({"arms": {"typo": {"objective": "dinov3"}}}, r"arms.typo.objective: Input should be"),
        ({"arms": {"typo": {"objective": "dinov2", "stepz": 1}}}, r"arms.typo.stepz: Extra inputs"),
        ({"arms": {"lost": {"objective": "distill", "distill": {"teacher": "arm:none"}}}}, r"no arm 'none' without"),
        (
            {"arms": {"two": {"objective": "distill", "distill": {"teacher": "arm:student"}}}},
            r"no arm 'student' with",
        ),
        ({"probes": {"p": {"dataa": 1}}}, r"probes.p.dataa: Extra inputs"),
        ({"vlm": {"stages": []}}, r"vlm.*"),
        ({"llm_init": "lm"}, r"llm_init: is an arm of the trained models; give vlm"),
    ],
)
def test_unequal_terms_and_mistakes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ComparisonConfig(**comparison(**changes))


def test_no_arm_is_refused() -> None:
    with pytest.raises(ValidationError, match="give at least one arm"):
        ComparisonConfig(**(comparison() | {"arms": {}}))


def test_the_whole_comparison_and_going_on_with_it(tmp_path: Path) -> None:
    language = tmp_path / "lm"
    tiny_lm(language)
    changes = {
        "arms": {"student": {"distill": {"teacher": "arm:contrastive"}}},
        "probes": {
            "figure": {
                "data": {"source": "generated:shapes", "train_limit": 24, "test_limit": 12},
                "probes": ["knn"], "knn": {"k": [3]}, "bootstrap_samples": 100,
            }
        },
        "vlm": {
            "model": {"text": str(language), "connector": "linear"},
            "data": {"sources": [SHAPES]},
            "stages": [{"name": "connector", "train": {"connector": 1e-3}, "steps": 1, "batch_size": 2}],
            "training": {"threads": 1, "log_every_steps": 1},
            "evaluation": {
                "tasks": [
                    {
                        "name": "shapes", "source": {"source": "generated:shapes", "split": "test", "limit": 4},
                        "scorer": "exact_match", "max_new_tokens": 2,
                    }
                ]
            },
            "blind_image": "blank",
        },
        "llm_init": str(language),
    }  # fmt: skip
    config = ComparisonConfig(**comparison(**changes))
    out = tmp_path / "out"
    results = run_comparison(config, out, recipe_text="kind: comparison", say=lambda line: None)
    assert list(results["pretraining"]) == ["student", "contrastive"]
    assert {row["declared"] for row in results["pretraining"].values()} == {"contrastive"}
    assert {row["samples"] for row in results["pretraining"].values()} == {8}
    assert set(results["vlm"]) == {"student", "contrastive", "random_encoder", "blind", "llm_init"}
    assert set(results["vlm_minus_random"]) == {"student", "contrastive", "blind", "llm_init"}
    row = results["probes"]["figure, knn"]["contrastive"]
    assert row["encoder"]["count"] == 12
    assert {"random_weights", "raw_pixels", "minus_random"} <= set(row)
    page = (out / "report.html").read_text(encoding="utf-8")
    for part in ("Frozen features: figure, knn (accuracy)", "llm init", "encoders/student/report.html", "One seed"):
        assert part in page, part
    assert (out / "encoders" / "student" / "report.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("training.json")}
    again = run_comparison(config, out, resume=True, say=lambda line: None)
    assert json.dumps(again) == json.dumps(results)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("training.json")}


def test_encoders_of_different_architecture_are_refused(tmp_path: Path) -> None:
    wide = {"objective": "contrastive", "shape": {"hidden_size": 32}}
    config = ComparisonConfig(**(comparison() | {"arms": {"wide": wide, "contrastive": {"objective": "contrastive"}}}))
    differ = r"differ in \(width, depth, patch, image side\): wide \(32, 1,.*contrastive \(16"
    with pytest.raises(UsageError, match=differ):
        run_comparison(config, tmp_path, say=lambda line: None)


def test_the_reading_names_what_is_above_chance_only() -> None:
    results: dict[str, Any] = {
        "pretraining": {"a": {}, "b": {}},
        "probes": {"p": {"a": {"minus_random": {"low": 0.1}}, "b": {"minus_random": {"low": -0.1}}}},
        "vlm_minus_random": {"a": {"t": {"low": -1}, "u": {"low": 0}}, "b": {"t": {"low": -1}, "u": {"low": 0.1}}},
        "vlm_minus_blind": {"a": {"t": {"low": 1}}, "b": {"t": {"low": 1}}},
    }
    text = findings(results)
    assert "p: a is above random weights" in text
    assert "trained models on t: no arm is above a random encoder" in text
    assert "trained models on u: b is above a random encoder" in text
    assert "trained models on t: all arms are above the blind model" in text
    assert "One seed was run" in limits(results)
