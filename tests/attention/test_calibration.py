from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from attention.test_prefill import BLOCKS, text_inputs, text_model
from unclipped.attention import calibration
from unclipped.attention.calibration import FIXED, LENGTHS, Calibration, Shape, calibration_for, measure
from unclipped.attention.layout import Layout
from unclipped.attention.plan import build_plan
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError

SHAPE = Shape(4, 2, 16, torch.float32, **BLOCKS)


class Clock:
    """Time that calls take by their kind: dense, low density, middle density, in this order, over and over."""

    def __init__(self, seconds: tuple[float, float, float]) -> None:
        self.seconds, self.calls, self.now = seconds, 0, 0.0

    def __call__(self) -> float:
        if self.calls % 2:
            self.now += self.seconds[self.calls // 2 % 3]
        self.calls += 1
        return self.now


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_KNOWN", {})
    return tmp_path / "unclipped" / "attention"


def test_the_break_even_density_is_where_times_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is linear in density: with dense at twice the low plan's time the line is followed up to it."""
    monkeypatch.setattr(calibration, "LENGTHS", (128, 256, 512))
    densities = []
    for window in (128 // 16, 128 // 2):
        plan = build_plan(parse_pattern(f"window({window})"), Layout.from_token_types([0] * 128), **BLOCKS)
        densities.append(plan.density)
    low, high = densities
    measured = measure(SHAPE, Clock((1.05 * 3.0, 2.0, 4.0)))
    assert measured.is_measured
    assert measured.densities[0] == pytest.approx(low + (high - low) / 2, abs=1e-3)
    assert measure(SHAPE, Clock((0.1, 2.0, 2.5))).densities == (0.0,) * 3
    assert measure(SHAPE, Clock((99.0, 2.0, 4.0))).densities == (1.0,) * 3
    assert measure(SHAPE, Clock((9.0, 2.0, 2.0))).densities == (1.0,) * 3
    assert measure(SHAPE, Clock((1.0, 2.0, 2.0))).densities == (0.0,) * 3


def test_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(calibration, "LENGTHS", (128, 256))
    first = calibration_for(SHAPE)
    (file,) = cache.iterdir()
    held = json.loads(file.read_text())
    assert held["key"]["threads"] == torch.get_num_threads()
    assert held["key"]["width"] == 16

    def never(shape: Shape) -> Calibration:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(calibration, "measure", never)
        assert calibration_for(SHAPE) is first
        calibration._KNOWN.clear()
        assert calibration_for(SHAPE) == first
    calibration._KNOWN.clear()
    file.write_text("{}")
    with caplog.at_level(logging.WARNING, "unclipped.attention"):
        calibration_for(SHAPE)
    assert "cannot be used and is measured again" in caplog.text
    assert json.loads(file.read_text())["key"] == held["key"]


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(calibration, "_KNOWN", {})
    monkeypatch.setattr(calibration, "measure", lambda shape: FIXED)
    with caplog.at_level(logging.WARNING, "unclipped.attention"):
        assert calibration_for(SHAPE) is FIXED
    assert "the measurement is not kept" in caplog.text


def test_rules_and_their_reasons() -> None:
    rule = Calibration((1024, 2048), (0.0, 0.4), is_measured=True)
    assert rule.reason_before(90) == "90 tokens are fewer than 1024"
    assert "no plan is faster than dense attention at 1500 tokens" in str(rule.reason_before(1500))
    assert rule.reason_before(9000) is None
    plan = build_plan(parse_pattern("full"), Layout.from_token_types([0] * 3000))
    assert rule.reason(plan, 3000) == (
        "density 1.00 is above 0.40, where dense attention is as fast on this machine (measured)"
    )
    assert rule.reason(build_plan(parse_pattern("window(64)"), Layout.from_token_types([0] * 3000)), 3000) is None
    assert FIXED.reason(plan, 4096) == "density 1.00 is above 0.50"


@pytest.mark.usefixtures("cache")
def test_auto_takes_the_measured_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = text_model("qwen3"), text_inputs(1100)
    inputs = {key: value[:1] for key, value in inputs.items()}
    for densities, mode in (((1.0, 1.0, 1.0), "sparse"), ((0.0, 0.0, 0.0), "dense")):
        rule = Calibration(LENGTHS, densities, is_measured=True)
        monkeypatch.setattr(calibration, "measure", lambda shape, rule=rule: rule)
        monkeypatch.setattr(calibration, "_KNOWN", {})
        for file in calibration.cache_folder().glob("*"):
            file.unlink()
        with sparse_prefill(model, "window(64)") as sparse, torch.no_grad():
            model(**inputs)
            assert sparse.report()[0].mode == mode
        with sparse_prefill(model, "window(64)", calibration="fixed") as sparse, torch.no_grad():
            model(**inputs)
            assert sparse.report()[0].reason == "1100 tokens are fewer than 4096"
        with sparse_prefill(model, "window(64)") as sparse:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            assert sparse.report()[0].reason == "1100 tokens are fewer than 4096"
    with pytest.raises(UsageError, match="expected 'measured', 'fixed' or a Calibration, found 'fast'"):
        sparse_prefill(model, "full", calibration="fast")  # type: ignore[arg-type]
