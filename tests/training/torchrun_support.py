"""Two gloo processes under torchrun, and what runs leave behind: shared by the tests of several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def two_processes(worker: Path, wanted: Sequence[Any], *folders: Path) -> None:
    """Run `worker` with `wanted` as JSON and the folders as its arguments in two processes; they must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*torchrun, str(worker), json.dumps(wanted), *map(str, folders)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def leave() -> None:
    """End a worker once all have finished. What torch's threads do while the interpreter goes down is not tested."""
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def rows(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, Tensor]:
    """The tensors of a run's model folder."""
    return load_file(output / "model" / "model.safetensors")
