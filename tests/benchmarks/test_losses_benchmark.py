"""The benchmark of losses runs every form, measures memory in processes of its own, and fits what grows."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "losses.py"
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script as a module; it stands outside the package."""
    spec = importlib.util.spec_from_file_location("losses", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_exponent_is_that_of_the_upper_half(benchmark: ModuleType) -> None:
    batches = [1, 2, 4, 8, 16, 32]
    values = [7.0, 1.0, 3.0] + [5.0 * batch**1.5 for batch in batches[3:]]
    assert benchmark.exponent(batches, values) == pytest.approx(1.5)
    assert math.isnan(benchmark.exponent([8], [3.0]))


@ON_LINUX
def test_a_whole_matrix_takes_more_memory_than_its_blocks(benchmark: ModuleType) -> None:
    given = argparse.Namespace(width=16, prototypes=64, chunk=128, threads=1)
    matrix = 4 * 2048**2
    whole, chunked = (benchmark.memory_apart("sigmoid", form, 2048, given) for form in ("whole", "chunked"))
    assert whole > 2 * matrix
    assert chunked < matrix


@ON_LINUX
def test_it_prints_and_writes_a_row_a_form(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "memory_apart", lambda loss, form, batch, arguments: batch**2)
    out = tmp_path / "losses.json"
    sizes = ["--batches", "64", "8", "16", "--most-whole", "16", "--width", "8", "--prototypes", "32", "--chunk", "4"]
    monkeypatch.setattr(sys, "argv", ["losses.py", *sizes, "--repeats", "2", "--json", str(out)])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "koleo    chunked  time ~ batch^" in printed
    assert "memory ~ batch^2.00" in printed
    rows = json.loads(out.read_text())["rows"]
    forms = {(row["loss"], row["form"]): [] for row in rows}
    for row in rows:
        forms[row["loss"], row["form"]].append(row["batch"])
        assert 0 <= row["low"] <= row["seconds"] <= row["high"]
    assert forms.pop(("sinkhorn", "whole")) == [8, 16, 64]
    assert forms == {
        (loss, form): [8, 16] if form == "whole" else [8, 16, 64]
        for loss in ("info_nce", "sigmoid", "koleo")
        for form in ("whole", "chunked")
    }
