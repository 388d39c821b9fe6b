"""The benchmark of views times what training uses, and runs without the package that it compares with."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "views.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script as a module; it stands outside the package."""
    spec = importlib.util.spec_from_file_location("views_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_views_are_planes_of_the_asked_sizes(benchmark: ModuleType) -> None:
    (encoded,) = benchmark.generated(1, 64, 48)
    first, local = benchmark.ours(32, 16, 3)(encoded)
    assert first.shape == (2, 3, 32, 32)
    assert local.shape == (3, 3, 16, 16)
    assert first.dtype == torch.float32
    assert first.min() < 0 < first.max()


def test_sides_run_in_turns_and_ratios_are_of_rates(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    clock = iter([0.0, 1.0, 0.0, 4.0, 0.0, 4.0, 0.0, 1.0])  # ours takes one second, the other four
    monkeypatch.setattr(benchmark.time, "process_time", lambda: next(clock))

    def side(name: str) -> list[torch.Tensor]:
        order.append(name)
        return [torch.zeros(3, 3, 8, 8)]

    rows = benchmark.compare({"ours": lambda _: side("ours"), "other": lambda _: side("other")}, [b"a", b"b"], 3, 2)
    assert order[2:] == ["ours", "ours", "other", "other", "other", "other", "ours", "ours"]
    assert [row["median"] for row in rows] == [6.0, 1.5]
    assert rows[1]["ratio"] == 4.0
    assert "ours / other: 4.00 [4.00, 4.00]" in capsys.readouterr().out


def test_the_script_runs(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "HAS_LIGHTLY", False)
    out = tmp_path / "views.json"
    sizes = ["--count", "2", "--width", "64", "--height", "48", "--global-size", "32", "--local-size", "16"]
    monkeypatch.setattr(sys, "argv", ["views.py", *sizes, "--repeats", "2", "--json", str(out)])
    benchmark.main()
    assert "their side is left out" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["side"], row["work"]) for row in rows] == [("ours", "views"), ("ours", "decoded")]
    monkeypatch.setattr(sys, "argv", ["views.py", "--images", str(tmp_path)])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "no JPEG in" in capsys.readouterr().err
