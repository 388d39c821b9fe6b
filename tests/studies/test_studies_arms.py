"""Arms side by side: all run, errors come through with their exit status, progress is read off the metrics."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.core.errors import DataError
from unclipped.studies.arms import ArmFailed, makespan, progress_of, run_side_by_side, threads_each


def work(root: str, name: str) -> None:
    """Run in another process: print, leave a file, and fail when the arm is called so."""
    print(f"{name} at work")
    if name == "bad":
        raise DataError("sample 7: no answer; add one")
    if name == "worse":
        raise RuntimeError("unforeseen")
    (Path(root) / name / "done").write_text(name)


def folders(root: Path, *names: str) -> dict[str, Path]:
    return {name: root / name for name in names}


def test_every_arm_runs_once_and_prints_into_its_own_log(tmp_path: Path) -> None:
    said: list[str] = []
    wanted = folders(tmp_path, "a", "b", "c")
    run_side_by_side(wanted, partial(work, str(tmp_path)), at_once=2, say=said.append)
    for name, folder in wanted.items():
        assert (folder / "done").read_text() == name
        assert (folder / "log.txt").read_text() == f"{name} at work\n"
    assert sorted(line for line in said if line.endswith("done")) == ["a: done", "b: done", "c: done"]


def test_an_error_comes_through_as_one_line_with_its_status(tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match="arm bad: sample 7: no answer; add one") as caught:
        run_side_by_side(folders(tmp_path, "bad"), partial(work, str(tmp_path)), at_once=2, say=lambda line: None)
    assert caught.value.exit_code == DataError.exit_code


def test_a_crash_points_at_the_log(tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match=r"arm worse: ended without a word; the end of .*log.txt"):
        run_side_by_side(folders(tmp_path, "worse"), partial(work, str(tmp_path)), at_once=1, say=lambda line: None)
    assert "unforeseen" in (tmp_path / "worse" / "log.txt").read_text()


def test_progress_is_the_last_whole_line(tmp_path: Path) -> None:
    assert progress_of("model", tmp_path) is None
    row = '{"stage": "all", "step": 3, "loss": 0.5, "samples_per_second": 90.0}'
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    assert progress_of("model", tmp_path) == "model: all step 3, loss 0.500, 90 samples/s"
    (tmp_path / "metrics.jsonl").write_text(row + '\n{"stage": "a')
    assert progress_of("model", tmp_path) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(1, 4))
def test_the_time_of_all_jobs_lies_between_its_bounds(durations: list[float], at_once: int) -> None:
    found = makespan(durations, at_once)
    assert max(max(durations), sum(durations) / at_once) - 1e-9 <= found <= sum(durations) + 1e-9
    assert makespan(durations, 1) == pytest.approx(sum(durations))
    assert threads_each(at_once) >= 1
