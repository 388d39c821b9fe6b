"""Two processes under torchrun give the losses and weights of one process at equal global batch: DDP and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed_worker import train
from torchrun_support import rows, two_processes, weights

from unclipped.objectives.answer import AnswerObjective

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")
# Half the samples have no image, so that some micro-batches have none at all; and micro-batches of one image each.
SETTINGS = {
    "adamw": {"optimizer": "adamw", "accumulation": 1, "text": 1.0},
    "muon": {"optimizer": "muon", "accumulation": 2, "text": 1e-3},
}
WRAPPERS = {"alone": "AnswerObjective", "ddp": "DistributedDataParallel", "fsdp2": "FSDPAnswerObjective"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of run folders: every setting alone in this process, and by two processes under DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("distributed")
    before = AnswerObjective.after_step
    for name, options in SETTINGS.items():
        train(folder, options | {"name": f"{name}-alone"})
    AnswerObjective.after_step = before  # type: ignore[method-assign]
    wanted = [
        options | {"parallel": parallel, "name": f"{name}-{parallel}"}
        for name, options in SETTINGS.items()
        for parallel in ("ddp", "fsdp2")
    ]
    crashing = SETTINGS["muon"] | {"parallel": "fsdp2", "name": "resumed"}
    wanted += [crashing | {"crash_after": 5}, crashing | {"resume": True}]
    two_processes(WORKER, wanted, folder)
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_processes_equal_one(runs: Path, name: str, parallel: str) -> None:
    alone, together = runs / f"{name}-alone", runs / f"{name}-{parallel}"
    assert [(row["stage"], row["step"]) for row in rows(together)] == [
        (row["stage"], row["step"]) for row in rows(alone)
    ]
    for mine, theirs in zip(rows(together), rows(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]
        assert mine["parts"] == pytest.approx(theirs["parts"], rel=1e-5, abs=1e-7)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    expected = weights(alone)
    for tensor, value in weights(together).items():
        torch.testing.assert_close(value, expected[tensor], atol=2e-4, rtol=1e-3)


def test_the_model_was_really_wrapped(runs: Path) -> None:
    for name in SETTINGS:
        for how, wrapper in WRAPPERS.items():
            record = json.loads((runs / f"{name}-{how}" / "training.json").read_text())
            assert {stage["wrapped_as"] for stage in record["stages"]} == {wrapper}
            assert record["hardware"]["processes"] == (1 if how == "alone" else 2)


def test_a_sharded_run_resumes_to_equal_weights(runs: Path) -> None:
    expected = weights(runs / "muon-fsdp2")
    assert all(torch.equal(value, expected[name]) for name, value in weights(runs / "resumed").items())
    assert [row["loss"] for row in rows(runs / "resumed")] == [row["loss"] for row in rows(runs / "muon-fsdp2")]
