"""Phases by two gloo processes: the losses and weights of one process, and an exact resume in the middle of a phase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from phase_support import tiny
from phases_worker import train
from torchrun_support import rows, two_processes, weights

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("phases_worker.py")
# KoLeo looks for neighbours within a process, so two processes equal one only without it.
DINO = {"local_crops": 1, "local_size": 8, "prototypes": 12, "head_hidden": 16, "bottleneck": 8, "koleo_weight": 0.0}
RUNS = {
    "dinov2": {"objective": "dinov2", "fields": {"dinov2": DINO}},
    "captioning": {"objective": "captioning", "parallel": "fsdp2"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for name, options in RUNS.items():
        train(folder, options | {"name": f"{name}-alone"})
    tiny("dinov2", folder)  # the data are written by one process
    wanted = [options | {"name": f"{name}-two"} for name, options in RUNS.items()]
    resumed = RUNS["dinov2"] | {"name": "dinov2-resumed"}
    wanted += [resumed | {"crash_after": 5}, resumed | {"resume": True}]
    two_processes(WORKER, wanted, folder)
    return folder


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_equal_one_in_every_stage(runs: Path, name: str) -> None:
    alone, together = runs / f"{name}-alone", runs / f"{name}-two"
    record = json.loads((together / "training.json").read_text())
    assert record["hardware"]["processes"] == 2
    wrapped = "DistributedDataParallel" if name == "dinov2" else "FSDPCaptioningObjective"
    assert [entry["wrapped_as"] for entry in record["stages"]] == [wrapped] * 2
    for mine, theirs in zip(rows(together), rows(alone), strict=True):
        assert (mine["stage"], mine["step"]) == (theirs["stage"], theirs["step"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    expected = weights(alone)
    assert expected["embeddings.position_embeddings"].shape == (1, 17, 16)
    for tensor, value in weights(together).items():
        torch.testing.assert_close(value, expected[tensor], atol=2e-4, rtol=1e-3)


def test_two_processes_resume_in_a_phase_to_equal_weights(runs: Path) -> None:
    expected = weights(runs / "dinov2-two")
    assert all(torch.equal(value, expected[name]) for name, value in weights(runs / "dinov2-resumed").items())
    assert [row["loss"] for row in rows(runs / "dinov2-resumed")] == [row["loss"] for row in rows(runs / "dinov2-two")]
