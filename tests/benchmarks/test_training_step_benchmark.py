"""The training-step benchmark compares like with like, and says so when it does not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training_step.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script as a module; it stands outside the package."""
    spec = importlib.util.spec_from_file_location("training_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(benchmark: ModuleType) -> tuple[Any, Any]:
    shape = benchmark.SHAPES["tiny"]
    ours, llava = benchmark.build_ours(shape, CPU), benchmark.build_llava(shape, CPU)
    benchmark.copy_weights(ours, llava)
    return ours, llava


@pytest.mark.parametrize(("batch", "supervised"), [(1, 1), (3, 8), (2, 32)])
def test_loss_and_gradients_equal(benchmark: ModuleType, pair: tuple[Any, Any], batch: int, supervised: int) -> None:
    inputs = benchmark.make_inputs(benchmark.SHAPES["tiny"], batch, supervised, CPU)
    result = benchmark.check_equal(*pair, inputs, CPU)
    assert result["loss"] > 1
    assert result["loss_difference"] <= 1e-6
    assert result["gradient_difference"] <= 1e-5


def test_every_gradient_equals(benchmark: ModuleType, pair: tuple[Any, Any]) -> None:
    inputs = benchmark.make_inputs(benchmark.SHAPES["tiny"], 2, 8, CPU)
    norms = []
    for model, side in zip(pair, ("ours", "llava"), strict=True):
        model(**inputs[side]).loss.backward()
        norms.append(sorted(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
    assert len(norms[0]) == len(norms[1])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4, abs=1e-7)


def test_other_weights_are_refused(benchmark: ModuleType, pair: tuple[Any, Any]) -> None:
    ours, llava = pair
    with torch.no_grad():
        llava.model.multi_modal_projector.linear_2.weight.mul_(2.0)
    inputs = benchmark.make_inputs(benchmark.SHAPES["tiny"], 2, 8, CPU)
    with pytest.raises(SystemExit, match="differ"):
        benchmark.check_equal(ours, llava, inputs, CPU)


def test_bf16_and_optimiser_step(benchmark: ModuleType, pair: tuple[Any, Any]) -> None:
    inputs = benchmark.make_inputs(benchmark.SHAPES["tiny"], 2, 8, CPU)
    assert benchmark.check_equal(*pair, inputs, CPU, "bf16")["loss_difference"] <= 1e-2
    steps = {
        side: benchmark.Step(model, "bf16", "adamw", CPU) for side, model in zip(("ours", "llava"), pair, strict=True)
    }
    before = pair[0].lm_head.weight.detach().clone()
    result = benchmark.compare_times(steps, inputs, batch=2, repeats=2, warmup=0)
    assert result["ratio_low"] <= result["ratio_median"] <= result["ratio_high"]
    assert not torch.equal(before, pair[0].lm_head.weight)
    assert all(parameter.grad is None for parameter in pair[0].parameters())


def test_full_shape_has_222m_parameters(benchmark: ModuleType) -> None:
    shape = benchmark.SHAPES["full"]
    assert shape.visual_tokens == 64
    with torch.device("meta"):
        model = benchmark.build_ours(shape, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(222e6, rel=0.01)


def run_script(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--device", "cpu", "--threads", "1", *arguments])
    benchmark.main()


def test_script_runs(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.json"
    settings = ["--scale", "tiny", "--batch", "2", "--supervised", "8", "4", "--repeats", "2", "--no-memory"]
    run_script(benchmark, monkeypatch, *settings, "--json", str(out))
    printed = capsys.readouterr().out
    assert "ratio" in printed
    assert "reduced shape" in printed
    result = json.loads(out.read_text())
    assert [row["supervised"] for row in result["rows"]] == [8, 4]
    assert result["settings"]["threads"] == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_memory_in_a_process_of_its_own(benchmark: ModuleType) -> None:
    arguments = argparse.Namespace(scale="tiny", dtype="fp32", device="cpu", optimizer="none", threads=1)
    measured = benchmark.memory_apart("ours", arguments, batch=2, supervised=8)
    assert measured["step_bytes"] > 0
    assert measured["baseline_bytes"] > 0


def test_impossible_numbers_are_refused(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_script(benchmark, monkeypatch, "--supervised", "65")
    assert stop.value.code == 2
    assert "expected 1 … 64" in capsys.readouterr().err
