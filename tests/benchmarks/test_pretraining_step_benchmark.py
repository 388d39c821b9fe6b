"""The benchmark of pretraining steps trains what it times, and compares sides in turns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "pretraining_step.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script as a module; it stands outside the package."""
    spec = importlib.util.spec_from_file_location("pretraining_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("side", ["masked", "all tokens", "dinov2"])
def test_a_step_trains(benchmark: ModuleType, side: str, dtype: str) -> None:
    torch.manual_seed(0)
    sizes = benchmark.Sizes(
        batch=2, side=32, patch=8, width=32, layers=1, heads=2, decoder_width=16, local_crops=2, local_side=16,
        prototypes=16, dtype=dtype,
    )  # fmt: skip
    make = {
        "masked": lambda: benchmark.our_autoencoder(sizes, 0.75),
        "all tokens": lambda: benchmark.our_autoencoder(sizes, 0.0),
        "dinov2": lambda: benchmark.our_dinov2(sizes),
    }[side]
    step = make()
    losses = [step().item() for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_blocks_are_those_of_encoder_and_decoder(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    sizes = benchmark.Sizes(
        batch=1, side=32, patch=8, width=32, layers=3, heads=2, decoder_width=16, compiled=("ours",)
    )  # fmt: skip
    benchmark.our_autoencoder(sizes, 0.75)
    assert compiled == 3 * ["ViTLayer"] + 2 * ["DecoderBlock"]
    compiled.clear()
    benchmark.our_dinov2(sizes)
    assert compiled == 6 * ["ViTLayer"]


def test_sides_run_in_turns(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def side(name: str) -> Tensor:
        order.append(name)
        return torch.zeros(())

    benchmark.compare({"ours": lambda: side("ours"), "other": lambda: side("other")}, batch=2, repeats=3)
    assert order[4:] == ["ours", "other", "other", "ours", "ours", "other"]  # after two steps each to warm up
    assert "ours / other: " in capsys.readouterr().out
