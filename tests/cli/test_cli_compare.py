"""`unclipped compare` as its user runs it: without torch, its files, and one clear line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input_support import expect_error, unclipped

from support.kept_runs import items, keep


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two evaluations, `a` and `b`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    keep(tmp_path / "a", {"t": items(40, prediction=lambda i: str(i % 7) if i % 2 else "none")})
    keep(tmp_path / "b", {"t": items(40)})
    return tmp_path


def test_files_and_table_without_torch(runs: Path) -> None:
    code = (
        "import sys; sys.argv = ['unclipped', 'compare', 'base=a', 'b', '--output', 'out']\n"
        "from unclipped.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=runs)
    assert (done.returncode, done.stderr) == (0, "")
    assert "+50.0 [" in done.stdout
    assert "report: out/report.html" in done.stdout
    names = {path.name for path in (runs / "out").iterdir()}
    assert names == {"results.json", "report.html", "recipe.yaml", "environment.json"}
    found = json.loads((runs / "out" / "results.json").read_text())
    assert found["runs"] == {"base": "a", "b": "b"}
    row = found["tasks"]["t"]["differences"]["b"]["overall"]
    assert (row["value"], row["verdict"]) == (0.5, "better")
    assert found["tasks"]["t"]["runs"]["base"]["overall"]["accuracy"] == 0.5
    record = json.loads((runs / "out" / "environment.json").read_text())
    assert "compare base=a b --output out" in record["command"]
    assert "gpu" not in record["hardware"]


def test_table_alone_writes_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(runs.rglob("*"))
    done = unclipped(monkeypatch, capsys, "compare", "a", "b", "--reference", "b", "--task", "t")
    assert (done.status, done.err) == (0, "")
    assert "−50.0 [" in done.out
    assert "worse" in done.out
    assert sorted(runs.rglob("*")) == before


def shorter(place: Path) -> None:
    keep(place / "short", {"t": items(30)})


def other_gold(place: Path) -> None:
    keep(place / "gold", {"t": items(40, answers=lambda i: ("9",))})


def other_scorer(place: Path) -> None:
    keep(place / "scorer", {"t": items(40)}, scorer="anls")


def other_task(place: Path) -> None:
    keep(place / "task", {"u": items(40)})


def unfinished(place: Path) -> None:
    (place / "b" / "results.json").unlink()


def empty(place: Path) -> None:
    (place / "empty").mkdir()


def nothing(place: Path) -> None:
    """The two good runs are enough."""


MISTAKES = {
    "no run": (nothing, [], 2, ["Missing argument", "unclipped compare --help"]),
    "one run": (nothing, ["a"], 2, ["at least two runs, found 1"]),
    "no such folder": (nothing, ["a", "c"], 2, ["c: no such folder"]),
    "a file": (nothing, ["a", "b/results.json"], 2, ["b/results.json: is a file"]),
    "one folder twice": (nothing, ["a", "again=./a"], 2, ["runs 'a' and 'again' are the same folder"]),
    "one name twice": (nothing, ["x=a", "x=b"], 2, ["two runs are called 'x' (a and b)", "NAME=FOLDER"]),
    "no name": (nothing, ["=a", "b"], 2, ["run '=a': expected FOLDER or NAME=FOLDER"]),
    "no folder": (nothing, ["x=", "b"], 2, ["run 'x=': expected FOLDER or NAME=FOLDER"]),
    "unknown reference": (nothing, ["base=a", "b", "--reference", "bas"], 2, ["--reference bas", "'base'"]),
    "unknown task": (nothing, ["a", "b", "--task", "tt"], 2, ["--task tt", "did you mean 't'"]),
    "no predictions": (empty, ["a", "empty"], 1, ["empty: holds no predictions", "predictions/TASK"]),
    "unfinished": (unfinished, ["a", "b"], 1, ["b: its evaluation is not finished", "--resume"]),
    "no common task": (other_task, ["a", "task"], 1, ["no task is common", "'a' has t", "'task' has u"]),
    "other items": (shorter, ["a", "short"], 1, ["task t", "item-30 is in 'a' and not in 'short'", "--common"]),
    "other gold": (other_gold, ["a", "gold"], 1, ["item item-0", "gold answer '0' in 'a' and '9' in 'gold'"]),
    "other scorer": (other_scorer, ["a", "scorer"], 1, ["exact_match in 'a'", "anls in 'scorer'", "--task"]),
    "output is a run": (nothing, ["a", "b", "--output", "b"], 2, ["--output b: the folder is not empty"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_line(
    name: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, arguments, status, says = MISTAKES[name]
    prepare(runs)
    output = [] if "--output" in arguments else ["--output", "out"]
    expect_error(unclipped(monkeypatch, capsys, "compare", *arguments, *output), status, *says)
    assert not (runs / "out").exists(), "what was left would block the corrected command"


def test_a_damaged_line_is_named(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "b" / "predictions" / "t" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[4][:20], "\n", *lines[5:]]))
    expect_error(unclipped(monkeypatch, capsys, "compare", "a", "b"), 1, "predictions.jsonl, line 5", "not valid JSON")
