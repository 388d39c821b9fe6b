"""Paired comparison of kept runs: figures against computations written out, how items are matched, what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from support.kept_runs import FAST, items, keep
from unclipped.core.errors import DataError, UnclippedError, UsageError
from unclipped.evaluation.config import EvaluationConfig
from unclipped.evaluation.kept import named_runs, task_folders
from unclipped.evaluation.paired import PairedConfig, PairedResult, compare_runs
from unclipped.evaluation.predictions import Prediction

QUIET = Console(file=io.StringIO(), width=120)


def compared(runs: dict[str, Path], **fields: Any) -> PairedResult:
    settings = {"runs": {name: str(folder) for name, folder in runs.items()}, "reference": next(iter(runs)), **fields}
    return compare_runs(PairedConfig(**settings), console=QUIET)


def two(tmp_path: Path, one: list[Prediction], other: list[Prediction], **fields: Any) -> dict[str, Path]:
    """Runs `a` and `b` of one task `t`."""
    return {
        "a": keep(tmp_path / "a", {"t": one}, **fields),
        "b": keep(tmp_path / "b", {"t": other}, **fields),
    }


def answered(count: int, right: float, seed: int) -> list[Prediction]:
    """Items in scenes of three and in two categories; about the share `right` is right, alike within a scene."""
    draw = np.random.default_rng(seed)
    scenes = draw.random(count // 3 + 1) < right
    hits = [bool(scenes[i // 3]) != (draw.random() < 0.1) for i in range(count)]
    return items(
        count,
        prediction=lambda i: str(i % 7) if hits[i] else "none",
        cluster=lambda i: f"scene {i // 3}",
        category=lambda i: "even" if i % 2 == 0 else "odd",
    )


def test_figures_are_those_of_a_bootstrap_written_out(tmp_path: Path) -> None:
    one, other = answered(300, 0.5, seed=1), answered(300, 0.75, seed=2)
    config = EvaluationConfig(bootstrap_samples=500, seed=3, confidence=0.9)
    result = compared(two(tmp_path, one, other, config=config)).tasks["t"]
    for name, parts in (("odd", [i for i in range(300) if i % 2]), (None, list(range(300)))):
        scenes = sorted({i // 3 for i in parts})
        right = np.zeros((len(scenes), 2))
        sizes = np.zeros(len(scenes))
        for i in parts:
            sizes[scenes.index(i // 3)] += 1
            right[scenes.index(i // 3)] += [run[i].prediction == run[i].answers[0] for run in (one, other)]
        drawn = np.random.default_rng(3).integers(0, len(scenes), size=(500, len(scenes)))
        shares = np.array([right[row].sum(axis=0) / sizes[row].sum() for row in drawn])  # (500, 2)
        found = result.differences["b"].overall if name is None else result.differences["b"].categories[name]
        scores = [run.overall if name is None else run.categories[name] for run in result.results.values()]
        value = (right[:, 1] - right[:, 0]).sum() / len(parts)
        assert found.value == pytest.approx(value)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares[:, 1] - shares[:, 0], [0.05, 0.95])))
        assert (found.count, found.clusters) == (len(parts), len(scenes))
        for column, score in enumerate(scores):
            assert score.value == pytest.approx(right[:, column].sum() / len(parts))
            assert (score.low, score.high) == pytest.approx(tuple(np.quantile(shares[:, column], [0.05, 0.95])))
        # The same interval from the normal approximation over scenes, without any drawing.
        residuals = right[:, 1] - right[:, 0] - value * sizes
        half = 1.645 * np.sqrt((residuals**2).sum()) / len(parts)
        assert found.low == pytest.approx(value - half, abs=0.025)
        assert found.high == pytest.approx(value + half, abs=0.025)
    assert result.verdict(result.differences["b"].overall) == "better"


def test_error_rates_are_ratios_of_sums_and_lower_is_better(tmp_path: Path) -> None:
    gold = [("abcdefgh"[: 1 + i % 8],) for i in range(64)]
    one = items(64, answers=lambda i: gold[i], prediction=lambda i: gold[i][0][:-1] + "x")
    other = items(64, answers=lambda i: gold[i], prediction=lambda i: gold[i][0] if i % 2 else gold[i][0][:-1])
    result = compared(two(tmp_path, one, other, scorer="character_error_rate")).tasks["t"]
    characters = sum(len(answer) for (answer,) in gold)
    assert result.results["a"].overall.value == pytest.approx(64 / characters)  # one edit an item
    assert result.differences["b"].overall.value == pytest.approx(32 / characters - 64 / characters)
    assert not result.metric.higher_is_better
    assert result.verdict(result.differences["b"].overall) == "better"


def test_scores_are_those_that_the_evaluation_printed(tmp_path: Path) -> None:
    runs = two(tmp_path, answered(90, 0.5, seed=1), answered(90, 0.6, seed=2))
    result = compared(runs).to_dict()["tasks"]["t"]
    for name, folder in runs.items():
        kept = json.loads((folder / "predictions" / "t" / "result.json").read_text())
        assert result["runs"][name]["overall"] == kept["overall"]
        assert result["runs"][name]["categories"] == kept["categories"]
    assert json.loads(json.dumps(result)) == result


def test_another_reference_turns_the_signs(tmp_path: Path) -> None:
    runs = two(tmp_path, answered(90, 0.5, seed=1), answered(90, 0.6, seed=2))
    one, other = compared(runs).tasks["t"], compared(runs, reference="b").tasks["t"]
    forward, back = one.differences["b"].overall, other.differences["a"].overall
    assert (back.value, back.low, back.high) == pytest.approx((-forward.value, -forward.high, -forward.low))
    assert list(one.differences) == ["b"]
    assert list(other.differences) == ["a"]
    assert one.results == other.results


def test_few_clusters_show_nothing(tmp_path: Path) -> None:
    wrong = items(120, prediction=lambda i: "none", cluster=lambda i: str(i % 29))
    runs = two(tmp_path, wrong, items(120, cluster=lambda i: str(i % 29)))
    found = compared(runs).tasks["t"]
    assert found.differences["b"].overall.excludes_zero
    assert found.verdict(found.differences["b"].overall) == "too few"


def test_equal_answers_show_no_difference(tmp_path: Path) -> None:
    found = compared(two(tmp_path, answered(120, 0.5, seed=1), answered(120, 0.5, seed=1))).tasks["t"]
    row = found.differences["b"].overall
    assert (row.value, row.low, row.high) == (0.0, 0.0, 0.0)
    assert found.verdict(row) == "not shown"


def test_common_items_are_matched_by_id_whatever_their_order(tmp_path: Path) -> None:
    one = items(60, prediction=lambda i: "none" if i < 20 else str(i % 7))
    other = [row for row in items(80) if row.index >= 10][::-1]  # item 79 comes first
    other = [Prediction(**(vars(row) | {"index": place})) for place, row in enumerate(other)]
    runs = two(tmp_path, one, other)
    with pytest.raises(DataError, match=r"task t: item item-0 is in 'a' and not in 'b' \('a' has 60 .* 50 are common"):
        compared(runs)
    result = compared(runs, common=True).tasks["t"]
    assert result.left_out == {"a": 10, "b": 20}
    assert result.differences["b"].overall.count == 50
    assert result.results["a"].overall.value == pytest.approx(40 / 50)
    assert result.differences["b"].overall.value == pytest.approx(10 / 50)
    assert result.notes == []


def test_the_same_items_in_another_order_need_no_flag(tmp_path: Path) -> None:
    turned = [Prediction(**(vars(row) | {"index": 39 - row.index})) for row in items(40)]
    result = compared(two(tmp_path, items(40, prediction=lambda i: str(i % 5)), turned)).tasks["t"]
    assert result.left_out == {}
    assert result.differences["b"].overall.value == pytest.approx(sum(i % 5 != i % 7 for i in range(40)) / 40)


def test_three_runs_are_cut_to_what_all_of_them_have(tmp_path: Path) -> None:
    runs = {name: keep(tmp_path / name, {"t": items(count)}) for name, count in (("a", 30), ("b", 40), ("c", 50))}
    with pytest.raises(DataError, match="item item-30 is in 'b' and not in 'a'"):
        compared(runs)
    result = compared(runs, common=True).tasks["t"]
    assert result.left_out == {"a": 0, "b": 10, "c": 20}
    assert {row.overall.count for row in result.results.values()} == {30}


def test_labels_of_the_reference_hold_for_all(tmp_path: Path) -> None:
    one = items(40, category=lambda i: "x", cluster=lambda i: str(i // 2))
    other = items(40, category=lambda i: "y", cluster=lambda i: str(i // 4))
    result = compared(two(tmp_path, one, other)).tasks["t"]
    assert set(result.results["b"].categories) == {"x"}
    assert result.results["b"].overall.clusters == 20
    assert result.notes == [
        "categories: those of a are taken, b has others",
        "clusters: those of a are taken, b has others",
    ]


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    one = keep(tmp_path / "a", {"t": items(40)}, max_new_tokens=8)
    source = {"source": "my-folder", "split": "test"}
    other = keep(tmp_path / "b", {"t": items(40)}, images="removed", prompt_suffix=" Briefly.", source=source,
                 max_new_tokens=8)  # fmt: skip
    assert compared({"a": one, "b": other}).tasks["t"].notes == [
        "images: a 'kept', b 'removed'",
        "prompt_suffix: a '', b ' Briefly.'",
        "source.split: a 'val', b 'test'",
    ]


def test_options_of_the_source_that_differ_are_told_one_by_one(tmp_path: Path) -> None:
    pages = {"source": "generated:needle", "options": {"size": [512, 512], "cells": [16, 8]}}
    larger = {"source": "generated:needle", "options": {"size": [704, 704], "cells": [16, 8], "font_size": [18, 25]}}
    one = keep(tmp_path / "a", {"t": items(40)}, source=pages)
    other = keep(tmp_path / "b", {"t": items(40)}, source=larger)
    assert compared({"a": one, "b": other}).tasks["t"].notes == [
        "source.options.size: a [512, 512], b [704, 704]",
        "source.options.font_size: a its default, b [18, 25]",
    ]


def test_equal_options_written_otherwise_are_one_scorer(tmp_path: Path) -> None:
    one = keep(tmp_path / "a", {"t": items(40)})
    other = keep(tmp_path / "b", {"t": items(40)}, scorer_options={"case_sensitive": False})
    assert compared({"a": one, "b": other}).tasks["t"].differences["b"].overall.value == 0.0


def test_only_common_tasks_and_only_those_asked_for(tmp_path: Path) -> None:
    one = keep(tmp_path / "a", {"t": items(30), "u": items(30), "v": items(30)})
    other = keep(tmp_path / "b", {"t": items(30), "u": items(30), "w": items(30)})
    result = compared({"a": one, "b": other})
    assert list(result.tasks) == ["t", "u"]
    assert result.not_common == {"v": ["a"], "w": ["b"]}
    assert list(compared({"a": one, "b": other}, tasks=("u",)).tasks) == ["u"]
    with pytest.raises(UsageError, match="--task v: not a task of every run; valid: t, u"):
        compared({"a": one, "b": other}, tasks=("v",))


def test_where_runs_keep_their_predictions(tmp_path: Path) -> None:
    trained = keep(tmp_path / "trained", {"t": items(30)}, place="evaluation/predictions")
    keep(trained / "baselines" / "blind", {"t": items(30)}, place="evaluation/predictions")
    evaluated = keep(tmp_path / "evaluated", {"t": items(30)})
    keep(evaluated, {"t": items(30)}, place="predictions-blind")
    assert task_folders(trained) == {"t": trained / "evaluation" / "predictions" / "t"}
    assert task_folders(evaluated) == {"t": evaluated / "predictions" / "t"}
    given = [trained, trained / "baselines" / "blind", evaluated, evaluated / "predictions-blind"]
    runs = named_runs([*map(str, given)])
    assert [*runs] == ["trained", "blind", "evaluated", "evaluated-blind"]
    assert compare_runs(PairedConfig(runs=runs, reference="trained"), console=QUIET).tasks["t"].notes == []
    with pytest.raises(
        DataError, match=f"holds no predictions .*there are some in {evaluated}, {trained}/baselines/blind"
    ):
        task_folders(tmp_path)


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "runs").mkdir()
    named = named_runs(["lr=0.1", "b=runs", "sweep/lr=0.2", "c d=e=f"])
    assert named == {"lr=0.1": "lr=0.1", "b": "runs", "lr=0.2": "sweep/lr=0.2", "c d": "e=f"}
    assert named_runs(["runs/x/evaluation/predictions"]) == {"x": "runs/x/evaluation/predictions"}


def damaged(change: Callable[[Path], Any]) -> Callable[[Path], dict[str, Path]]:
    """Run b after `change` of its folder."""

    def make(tmp_path: Path) -> dict[str, Path]:
        runs = two(tmp_path, items(40), items(40))
        change(runs["b"])
        return runs

    return make


def other_item(**fields: Callable[[int], Any]) -> Callable[[Path], dict[str, Path]]:
    """Run b with items of other fields."""
    return lambda tmp_path: two(tmp_path, items(40), items(40, **fields))


def cut(folder: Path) -> None:
    path = folder / "predictions" / "t" / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def different_scorers(tmp_path: Path) -> dict[str, Path]:
    one = keep(tmp_path / "a", {"t": items(40)})
    return {"a": one, "b": keep(tmp_path / "b", {"t": items(40)}, scorer="anls", scorer_options={"threshold": 0.6})}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: {"a": keep(path / "a", {"t": items(40)})}, UsageError, "at least two runs, found 1"),
        (
            lambda path: {"a": keep(path / "a", {"t": items(4)}), "b": keep(path / "b", {"u": items(4)})},
            DataError,
            "no task is common to all runs: 'a' has t; 'b' has u;",
        ),
        (damaged(lambda folder: (folder / "results.json").unlink()), DataError, r"b: its evaluation is not finished"),
        (
            damaged(lambda folder: (folder / "predictions" / "t" / "result.json").unlink()),
            DataError,
            r"b/predictions/t: the evaluation of this task is not finished \(result.json is missing\)",
        ),
        (damaged(cut), DataError, "holds 39 predictions where result.json beside it counts 40"),
        (
            damaged(lambda folder: (folder / "predictions" / "t" / "result.json").write_text("[]")),
            DataError,
            r"b/predictions/t/result.json: not the result of a task",
        ),
        (
            damaged(lambda folder: (folder / "predictions" / "t" / "task.json").write_text("{}")),
            DataError,
            "not the settings of an evaluated task",
        ),
        (different_scorers, DataError, r"task t: scored by exact_match in 'a' and by anls \{'threshold': 0.6\} in 'b'"),
        (
            other_item(answers=lambda i: ("x", "y") if i == 5 else (str(i % 7),)),
            DataError,
            "task t, item item-5: gold answer '5' in 'a' and 'x' | 'y' in 'b'; evaluate both on the same data",
        ),
        (
            other_item(question=lambda i: "why?" if i == 3 else f"what is {i}?"),
            DataError,
            r"task t, item item-3: question 'what is 3\?' in 'a' and 'why\?' in 'b'",
        ),
        (
            other_item(choices=lambda i: ("0", "1")),
            DataError,
            "task t, item item-0: choices none in 'a' and '0' | '1' in 'b'",
        ),
        (other_item(id=lambda i: f"item-{i + 2}"), DataError, "task t: item item-0 is in 'a' and not in 'b'"),
        (
            lambda path: two(path, items(40), items(41)),
            DataError,
            "item item-40 is in 'b' and not in 'a' .* or add --common",
        ),
        (
            lambda path: two(path, items(40), items(41, id=lambda i: f"item-{i // 2}")),
            DataError,
            "item item-0 stands twice in 'b', so they cannot be matched by id",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, make: Callable[[Path], dict[str, Path]], error: type[UnclippedError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        compared(make(tmp_path))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_nothing_in_common(tmp_path: Path) -> None:
    runs = two(tmp_path, items(40), items(40, id=lambda i: f"other-{i}"))
    with pytest.raises(DataError, match="task t: the runs have no item in common"):
        compared(runs, common=True)


def test_items_that_share_an_id_are_compared_when_all_runs_have_the_same(tmp_path: Path) -> None:
    rows = items(40, id=lambda i: f"item-{i // 2}")
    assert compared(two(tmp_path, rows, rows)).tasks["t"].differences["b"].overall.count == 40


def test_settings_of_intervals_are_the_reference_s(tmp_path: Path) -> None:
    one = keep(tmp_path / "a", {"t": answered(90, 0.5, seed=1)}, config=FAST.model_copy(update={"confidence": 0.5}))
    other = keep(tmp_path / "b", {"t": answered(90, 0.6, seed=2)})
    narrow, wide = (compared({"a": one, "b": other}, reference=name).tasks["t"] for name in ("a", "b"))
    assert narrow.to_dict()["intervals"]["confidence"] == 0.5
    widths = [row.high - row.low for row in (narrow.results["b"].overall, wide.results["b"].overall)]
    assert widths[0] < widths[1]
