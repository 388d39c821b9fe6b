"""The record of a run, training.json, and what a caller gets back."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unclipped.core.errors import CheckpointError


@dataclass(frozen=True)
class TrainingResult:
    """Where a finished run lies and what it cost."""

    output: Path
    """The run folder."""
    model_folder: Path
    """The trained model."""
    record: dict[str, Any]
    """Contents of training.json: hardware, and for each stage parameters, FLOPs, seconds, memory, perplexity."""

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return float(self.record["total"]["seconds"])


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of an earlier run in the same folder, None when there is none. Raises CheckpointError if damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error.msg}); start anew in another folder") from None


def hardware(device: torch.device, autocast: torch.dtype | None, processes: int) -> dict[str, Any]:
    """What the run is computed on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {
        "device": device.type,
        "name": name,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "precision": "fp32" if autocast is None else "bf16 autocast, fp32 weights",
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
