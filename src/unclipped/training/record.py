"""The record of a run, training.json, and what a caller gets back."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unclipped.core.documents import read_json
from unclipped.core.errors import CheckpointError
from unclipped.training.checkpoint import verify_files

RECORD, MODEL = "training.json", "model"
_REMEDY = "start a new run in another --output"


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
    if not path.exists():
        return None
    return check_record(read_json(path, error=CheckpointError, remedy=_REMEDY), path)


def check_record(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """`record`, which `path` holds. Raises CheckpointError unless it has the fields that resuming and reports read."""
    stages, is_finished = record.get("stages"), record.get("finished")
    whole = isinstance(is_finished, bool) and isinstance(stages, list)
    for entry in stages if isinstance(stages, list) else ():
        whole = whole and isinstance(entry, dict) and isinstance(entry.get("name"), str)
        whole = whole and ("passed_over" in entry or _has_numbers(entry, _READ if is_finished else _READ + _SUMMED))
    if not whole or (is_finished and not _has_numbers(record, _TOTALS)):
        raise CheckpointError(f"{path}: not the record of a training run; {_REMEDY}")
    return record


_TOTALS = ("total.seconds", "total.device_hours", "total.flops", "total.peak_memory_bytes")
_READ = ("steps", "batch_size", "seconds", "final_loss", "samples_per_second.median", "parameters.all.total")
"""What reports read of a finished stage."""
_SUMMED = ("device_hours", "flops.total", "peak_memory.bytes")
"""What is summed over the stages when the last one ends."""


def _has_numbers(fields: Any, paths: Sequence[str]) -> bool:
    """Whether numbers lie at all of these paths of keys, written `outer.inner`."""
    for path in paths:
        value = fields
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
    return True


def finished_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run. Raises CheckpointError when it is missing, damaged or of an unfinished one."""
    record = read_record(folder / RECORD)
    if record is None or not record["finished"]:
        raise CheckpointError(f"{folder / RECORD}: holds no finished training run; {_REMEDY}")
    return record


def verify_model(folder: Path, record: dict[str, Any]) -> None:
    """Compare the model of a finished run with the digests in its record, where there are some.

    Raises CheckpointError that names the file which is missing or has another content.
    """
    if "model_files" in record:
        verify_files(folder / MODEL, record["model_files"], folder / RECORD, f"put it back, or {_REMEDY}")


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
