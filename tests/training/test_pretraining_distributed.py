"""Two processes under torchrun pretrain encoders as one process does at equal global batch: DDP and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_support import VIT
from pretraining_worker import koleo_in_shares, prepare, run
from torchrun_support import rows, two_processes, weights

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("pretraining_worker.py")
DINOV2 = {name: value for name, value in VIT.items() if name != "intermediate_size"} | {"model_type": "dinov2"}
# KoLeo looks for neighbours within a process, so one process must do so within the shares that two would have: by
# itself where Sinkhorn, which balances over a whole micro-batch, allows no smaller micro-batches.
SETTINGS: dict[str, dict[str, Any]] = {
    "sinkhorn": {
        "objective": "dinov2", "shape": DINOV2, "clip_norm": 0.5, "clip_per_module": True, "schedule_steps": 4,
        "final_learning_rate": 1e-5,
        "training": {"optimizer": {"weight_decay": 0.04, "final_weight_decay": 0.2, "patch_embedding_factor": 0.2}},
    },
    "ema": {"objective": "dinov2", "dinov2": {"centring": "ema"}, "gradient_accumulation": 2},
    "masked_autoencoder": {"objective": "masked_autoencoder", "gradient_accumulation": 2},
    "distill": {"objective": "distill"},
    "contrastive": {"objective": "contrastive"},
    "sigmoid": {"objective": "sigmoid", "pairs": {"chunk": 3}},
    "coca": {"objective": "coca"},
}  # fmt: skip
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}


def parallel_run(name: str, parallel: str) -> dict[str, Any]:
    """The options of a setting by two processes."""
    options = SETTINGS[name]
    return options | {"training": options.get("training", {}) | {"parallel": parallel}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of run folders: every setting alone in this process, and by two processes under DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("distributed")
    prepare(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, options in SETTINGS.items():
        alone = options | {"name": f"{name}-alone"}
        if name == "ema":  # as many micro-batches, of the same size
            run(folder, alone | {"gradient_accumulation": 4})
        elif options["objective"] == "dinov2":
            with koleo_in_shares(2):
                run(folder, alone)
        else:
            run(folder, alone)
    wanted = [
        parallel_run(name, parallel) | {"name": f"{name}-{parallel}"} for name in SETTINGS for parallel in WRAPPERS
    ]
    sharded = parallel_run("sinkhorn", "fsdp2")
    wanted += [sharded | {"name": name, "crash_after": 5} for name in ("resumed", "resumed-alone")]
    wanted += [sharded | {"name": "resumed", "resume": True}]
    two_processes(WORKER, wanted, folder)
    with koleo_in_shares(2):  # the checkpoint is whole: one process may go on with what two have begun
        run(folder, sharded | {"name": "resumed-alone", "resume": True})
    torch.set_num_threads(before)
    return folder


def assert_same_course(one: Path, other: Path) -> None:
    """Losses, parts and norms step by step, and the weights of the saved encoder, up to the order of sums in fp32."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]
        assert mine["parts"] == pytest.approx(theirs["parts"], rel=1e-5, abs=1e-6), mine["step"]
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4), mine["step"]
        assert mine.get("gradient_norms", {}) == pytest.approx(theirs.get("gradient_norms", {}), rel=1e-4)
        assert mine.get("schedules") == theirs.get("schedules")
    expected = weights(other)
    for tensor, value in weights(one).items():
        torch.testing.assert_close(value, expected[tensor], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("parallel", list(WRAPPERS))
@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_processes_equal_one(runs: Path, name: str, parallel: str) -> None:
    record = json.loads((runs / f"{name}-{parallel}" / "training.json").read_text())
    assert record["stages"][0]["wrapped_as"].startswith(WRAPPERS[parallel])
    assert record["hardware"]["processes"] == 2
    assert record["stages"][0]["flops"]["per_step"] > 0
    assert_same_course(runs / f"{name}-{parallel}", runs / f"{name}-alone")


def test_a_sharded_run_resumes_to_equal_weights(runs: Path) -> None:
    expected = weights(runs / "sinkhorn-fsdp2")
    assert all(torch.equal(value, expected[name]) for name, value in weights(runs / "resumed").items())
    assert [row["loss"] for row in rows(runs / "resumed")] == [row["loss"] for row in rows(runs / "sinkhorn-fsdp2")]


def test_one_process_goes_on_with_a_sharded_run(runs: Path) -> None:
    record = json.loads((runs / "resumed-alone" / "training.json").read_text())
    assert record["stages"][0]["wrapped_as"] == "DinoV2Objective"
    assert_same_course(runs / "resumed-alone", runs / "sinkhorn-fsdp2")
