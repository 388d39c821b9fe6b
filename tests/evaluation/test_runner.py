"""The runner: raw answers kept, resumed and scored anew; groups, blind arm, paired differences; bad input."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from support.tiny_models import tiny_image, tiny_vlm
from unclipped.core.errors import DataError, UnclippedError, UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.sample import Sample
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.runner import (
    compare_folders,
    evaluate,
    evaluate_model,
    predictions_folder,
    read_predictions,
    rescore,
)
from unclipped.images.prepare import decoded
from unclipped.inference.engine import Engine

QUIET = Console(file=io.StringIO(), width=120)
FAST = EvaluationConfig(bootstrap_samples=100)


class Scripted(Engine):
    """Answers through a function of the prompt; counts what it was asked."""

    def __init__(self, answer: Callable[[Sample], str], name: str = "scripted") -> None:
        self.answer, self.name, self.asked = answer, name, []
        self.processor = SimpleNamespace(image_processor=SimpleNamespace(mean=(0.5, 0.5, 0.5)))

    def fingerprint(self) -> str:
        return self.name

    def generate(self, requests: Sequence[Any], *, on_progress: Any = None, **options: Any) -> list[str]:
        self.asked += requests
        if on_progress is not None:
            on_progress(len(requests))
        return [self.answer(request) for request in requests]


def sighted(sample: Sample) -> str:
    """Right when it sees the image: items are numbered in their ids, the answer to item n is n mod 7."""
    return str(int(sample.id.split("-")[-1]) % 7) if sample.images else "0"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty questions on ten images, in two categories."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(40):
        if number < 10:
            tiny_image(16, 16, offset=number).save(folder / f"{number}.png")
        rows.append(
            {
                "id": f"scene{number % 10}-{number}",
                "image": f"{number % 10}.png",
                "question": f"question {number}?",
                "answer": str(number % 7),
                "category": ("even", "odd")[number % 2],
            }
        )
    for split, part in (("val", rows), ("train", rows[:4])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def task(data: Path, **fields: Any) -> TaskConfig:
    source = SourceConfig(source=str(data), split="val", cluster=r"scene(\d+)-")
    return TaskConfig(**({"name": "numbers", "source": source} | fields))


def run(engine: Engine, task_config: TaskConfig, output: Path, **options: Any) -> Any:
    return evaluate(engine, task_config, output, **({"config": FAST, "console": QUIET, "batch_size": 4} | options))


def test_figures_categories_and_files(data: Path, tmp_path: Path) -> None:
    engine = Scripted(lambda sample: sighted(sample) if int(sample.id.split("-")[-1]) % 2 == 0 else "none")
    result = run(engine, task(data), tmp_path / "out")
    assert (result.overall.value, result.overall.count, result.overall.clusters) == (0.5, 40, 10)
    assert result.categories["even"].value == 1.0
    assert result.categories["odd"].value == 0.0
    assert result.categories["even"].count == 20
    assert set(result.categories["even"].row()) == {"accuracy", "low", "high", "count"}
    rows = read_predictions(tmp_path / "out")
    assert len(rows) == 40
    assert rows[3].prediction == "none"
    assert rows[3].score == 0.0
    assert rows[4].cluster == "4"
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["overall"]["accuracy"] == 0.5
    assert saved == json.loads(json.dumps(result.to_dict()))


def test_prompt_texts_and_no_gold_in_the_prompt(data: Path, tmp_path: Path) -> None:
    engine = Scripted(sighted)
    run(engine, task(data, prompt_prefix="Q: ", prompt_suffix=" Answer with one word."), tmp_path / "out")
    assert engine.asked[0].question == "Q: question 0? Answer with one word."
    assert engine.asked[0].turns[-1].role == "user"
    assert read_predictions(tmp_path / "out")[0].question == "question 0?"


def test_resume_asks_only_what_is_missing(data: Path, tmp_path: Path) -> None:
    whole = run(Scripted(sighted), task(data), tmp_path / "whole")
    path = tmp_path / "out" / "predictions.jsonl"
    run(Scripted(sighted), task(data), tmp_path / "out")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:11]) + lines[11][:25])  # cut in the middle of the twelfth line
    engine = Scripted(sighted)
    result = run(engine, task(data), tmp_path / "out")
    assert len(engine.asked) == 29
    assert result.categories == whole.categories
    assert path.read_text() == (tmp_path / "whole" / "predictions.jsonl").read_text()
    engine = Scripted(sighted)
    run(engine, task(data), tmp_path / "out")
    assert engine.asked == []


def test_predictions_of_something_else_are_refused(data: Path, tmp_path: Path) -> None:
    run(Scripted(sighted), task(data), tmp_path / "out")
    with pytest.raises(UsageError, match="another model or other task settings"):
        run(Scripted(sighted, "other"), task(data), tmp_path / "out")
    with pytest.raises(UsageError, match="another model or other task settings"):
        run(Scripted(sighted), task(data, prompt_suffix=" please"), tmp_path / "out")
    with pytest.raises(UsageError, match="another model or other task settings"):
        run(Scripted(sighted), task(data), tmp_path / "out", blind=True)
    with pytest.raises(UsageError, match="add --resume"):
        run(Scripted(sighted), task(data), tmp_path / "out", resume=False)
    # A scorer does not change the answers, so it may change on resume.
    result = run(Scripted(sighted), task(data, scorer="character_error_rate"), tmp_path / "out")
    assert result.overall.value == 0.0


def test_rescore_needs_no_model(data: Path, tmp_path: Path) -> None:
    first = run(Scripted(lambda sample: "0."), task(data), tmp_path / "out")
    assert first.overall.value == 0.0
    second = rescore(tmp_path / "out", scorer="within_percent", console=QUIET).model["numbers"]
    assert second.overall.value == pytest.approx(6 / 40)
    again = rescore(tmp_path / "out", console=QUIET).model["numbers"]
    assert again.overall == first.overall
    assert again.categories == first.categories
    with pytest.raises(UsageError, match="did you mean 'exact_match'"):
        rescore(tmp_path / "out", scorer="exact_mach", console=QUIET)
    with pytest.raises(DataError, match="no predictions below"):
        rescore(tmp_path / "nothing", console=QUIET)


def test_rescore_refuses_what_was_interrupted(data: Path, tmp_path: Path) -> None:
    asked = []

    def stops(sample: Any) -> str:
        asked.append(sample.id)
        if len(asked) > 20:
            raise KeyboardInterrupt
        return sighted(sample)

    with pytest.raises(KeyboardInterrupt):
        run(Scripted(stops), task(data), tmp_path / "out", batch_size=1)
    assert (tmp_path / "out" / "predictions.jsonl").exists()
    with pytest.raises(DataError, match="interrupted before its end; finish it with --resume"):
        rescore(tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out" / "result.json").exists()
    run(Scripted(sighted), task(data), tmp_path / "out")
    assert rescore(tmp_path / "out", console=QUIET).model["numbers"].overall.value == 1.0


def test_blind_arm_and_paired_difference(data: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(tasks=(task(data),), blind=True, bootstrap_samples=100, batch_size=4)
    out = io.StringIO()
    result = evaluate_model(Scripted(sighted), config, tmp_path / "out", console=Console(file=out, width=120))
    assert result.model["numbers"].overall.value == 1.0
    assert result.blind["numbers"].overall.value == pytest.approx(6 / 40)
    difference = result.differences["numbers"].overall
    assert difference.value == pytest.approx(34 / 40)
    assert difference.excludes_zero
    assert difference.clusters == 10
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(saved) == {"model", "blind", "differences"}
    assert saved["differences"]["blind"]["numbers"]["categories"]["odd"]["count"] == 20
    shown = out.getvalue()
    assert "blind" in shown
    assert "odd" in shown
    assert "+85.0" in shown
    again = rescore(tmp_path / "out", console=QUIET)
    assert again.differences == result.differences
    sides = [predictions_folder(tmp_path / "out", "numbers", blind=blind) for blind in (False, True)]
    assert compare_folders(sides[1], sides[0], task(data), config).overall.value == pytest.approx(-34 / 40)


def test_blank_images_keep_their_size(data: Path, tmp_path: Path) -> None:
    engine = Scripted(sighted)
    run(engine, task(data), tmp_path / "out", images="blank")
    image = decoded(engine.asked[0].images[0])
    assert image.size == (16, 16)
    assert image.getcolors() == [(256, (128, 128, 128))]


def test_groups_of_unseen_answers_and_extra_scorers(data: Path, tmp_path: Path) -> None:
    train = SourceConfig(source=str(data), split="train")  # answers 0 to 3
    config = task(data, unseen_answers_of=train, extra_scorers={"character_error_rate": {}, "anls": {}})
    result = run(Scripted(lambda sample: sighted(sample) if sighted(sample) < "4" else "x"), config, tmp_path / "out")
    assert result.groups["seen_answers"].overall.value == 1.0
    assert result.groups["unseen_answers"].overall.value == 0.0
    assert result.groups["unseen_answers"].overall.count == sum(number % 7 > 3 for number in range(40))
    assert result.extra["character_error_rate"].overall.value == pytest.approx(1 - result.overall.value)
    saved = result.to_dict()
    assert "character_error_rate" in saved["extra"]["character_error_rate"]["overall"]


def test_held_out_flag_makes_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample.qa(f"s-{n}", [], "?", str(n % 7), metadata={"held_out": n % 3 == 0}) for n in range(30)]

    class Listed:
        name, length = "listed", 30

        def __getitem__(self, index: int) -> Sample:
            return samples[index]

    monkeypatch.setattr("unclipped.evaluation.questions.open_source", lambda config: Listed())
    config = TaskConfig(name="t", source=SourceConfig(source="generated:anything"))
    result = run(Scripted(lambda sample: str(int(sample.id[2:]) % 7)), config, tmp_path / "out")
    assert result.groups["held_out"].overall.count == 10
    assert result.groups["not_held_out"].overall.count == 20
    assert set(result.categories) == {"all"}


def test_questions_about_one_image_are_drawn_together(data: Path, tmp_path: Path) -> None:
    plain = task(data, source=SourceConfig(source=str(data), split="val"))
    result = run(Scripted(sighted), plain, tmp_path / "out")
    assert (result.overall.count, result.overall.clusters) == (40, 10)
    assert read_predictions(tmp_path / "out")[3].cluster == "images 3.png"


def test_limit_and_single_category_table(data: Path, tmp_path: Path) -> None:
    assert run(Scripted(sighted), task(data, limit=5), tmp_path / "out").overall.count == 5


def test_unreadable_answers_are_counted_and_told(tmp_path: Path) -> None:
    rows = [
        {"id": f"c-{n}", "question": "which?", "answer": "cat", "choices": ["cat", "dog"], "image": "a.png"}
        for n in range(4)
    ]
    tiny_image().save(tmp_path / "a.png")
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvaluationConfig(
        tasks=(TaskConfig(name="c", source={"source": str(tmp_path), "split": "val"}, scorer="multiple_choice"),),
        bootstrap_samples=100,
    )
    out = io.StringIO()
    answers = {"c-0": "A", "c-1": "<think>A cat?</think>b", "c-2": "neither", "c-3": ""}
    result = evaluate_model(
        Scripted(lambda sample: answers[sample.id]), config, tmp_path / "out", console=Console(file=out, width=120)
    )
    assert result.model["c"].num_unparsed == 2
    assert "2 of 4 answers could not be read and count as wrong (50.0%)" in out.getvalue()
    assert "1 of 4 answers held thinking, which is not scored" in out.getvalue()
    kept = json.loads((tmp_path / "out" / "predictions" / "c" / "result.json").read_text())
    assert (kept["unparsed_share"], kept["num_with_thinking"]) == (0.5, 1)


def test_a_real_model_end_to_end(data: Path, tmp_path: Path) -> None:
    tiny_vlm(tmp_path / "parts", seed=4, output=tmp_path / "vlm")
    config = EvaluationConfig(
        tasks=(task(data, limit=6, max_new_tokens=4),), blind=True, batch_size=4, bootstrap_samples=100
    )
    result = evaluate_model(tmp_path / "vlm", config, tmp_path / "out", device="cpu", console=QUIET)
    assert result.model["numbers"].overall.count == 6
    seen, blind = (
        [row.prediction for row in read_predictions(predictions_folder(tmp_path / "out", "numbers", blind=flag))]
        for flag in (False, True)
    )
    assert seen != blind
    with pytest.raises(UsageError, match="add --resume"):
        evaluate_model(tmp_path / "vlm", config, tmp_path / "out", device="cpu", console=QUIET)
    again = evaluate_model(tmp_path / "vlm", config, tmp_path / "out", device="cpu", resume=True, console=QUIET)
    assert again.model["numbers"].overall == result.model["numbers"].overall


@pytest.mark.parametrize(
    ("fields", "rows", "error", "message"),
    [
        ({}, [], DataError, "empty"),
        ({"source": {"source": "generated:characters"}}, None, UsageError, "limit"),
        ({}, [{"id": "a", "question": "?", "image": "0.png", "answer": ""}], DataError, "sample a: has no gold"),
        ({"scorer": "multiple_choice"}, None, DataError, "choices"),
        ({}, [{"id": "a", "question": "?", "image": "gone.png", "answer": "1"}], UnclippedError, "gone.png"),
    ],
)
def test_bad_tasks(
    data: Path, tmp_path: Path, fields: dict, rows: list | None, error: type[Exception], message: str
) -> None:
    if rows is not None:
        (data / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = fields | {"source": {"source": str(data), "split": "val"}}

    def look(sample: Sample) -> str:
        from unclipped.images.decode import load_image

        return str(load_image(sample.images[0].source).size)

    with pytest.raises(error, match=message) as caught:
        run(Scripted(look), task(data, **fields), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tasks"):
        evaluate_model(Scripted(sighted), EvaluationConfig(), tmp_path, console=QUIET)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "task.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "task.json").write_text("{}"), "not the settings of an evaluated task"),
        (lambda folder: (folder / "predictions.jsonl").write_text('{"id": 1}\n'), "line 1: not a prediction"),
        (lambda folder: (folder / "predictions.jsonl").write_text(""), "no predictions to score"),
    ],
)
def test_damaged_folders(data: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    run(Scripted(sighted), task(data), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        rescore(tmp_path / "out", console=QUIET)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scorer": "exact"}, "did you mean 'exact_match'"),
        ({"scorer_options": {"case": True}}, "no option 'case'"),
        ({"extra_scorers": {"exact_match": {}}}, "name it once"),
        ({"name": "a/b"}, "pattern"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"scorrer": "anls"}, "Extra inputs"),
    ],
)
def test_task_settings_are_checked(data: Path, fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(data, **fields)


def test_evaluation_settings_are_checked(data: Path) -> None:
    with pytest.raises(ValidationError, match="share the name 'numbers'"):
        EvaluationConfig(tasks=(task(data), task(data)))
    with pytest.raises(ValidationError, match="set blind: false"):
        EvaluationConfig(blind=True, images="removed")


def test_progress_in_plain_lines(data: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    run(Scripted(sighted), task(data), tmp_path / "out", console=Console(file=out, width=120))
    assert "numbers  40/40" in out.getvalue()
    assert "items/s" in out.getvalue()
