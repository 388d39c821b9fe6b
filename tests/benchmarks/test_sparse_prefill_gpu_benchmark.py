"""The benchmark of sparse prefill on a GPU runs up to the device: its dry run goes through all parts on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "sparse_prefill_gpu.py")]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *(path for path in sys.path if path)])
    return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=200)


def test_dry_run(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    said = call("--dry-run", "--backward", "--repeats", "1", "--json", str(file))
    assert said.returncode == 0, said.stderr
    result = json.loads(file.read_text())
    assert result["backend"] == "gather"
    assert len(result["agreement"]) == 8
    assert all(row["agrees"] and row["output_error"] > 0 for row in result["agreement"])
    assert {row["backward"] for row in result["attention"]} == {False, True}
    for row in (*result["attention"], *result["prefill"]):
        assert 0 < row["density"] < 0.7
        assert row["seconds"]["sparse"] > 0
        assert row["best_dense"] == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    said = call()
    assert said.returncode == 2
    assert "no CUDA device; use --dry-run" in said.stderr


def test_bad_repeats() -> None:
    said = call("--dry-run", "--repeats", "0")
    assert said.returncode == 2
    assert "--repeats: expected at least 1, found 0" in said.stderr
