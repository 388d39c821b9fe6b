"""Peak memory of a piece of work: of the process on Linux, of the device on CUDA."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `run` held at its peak beyond what was held before it. None where the system does not tell.

    On a CPU this is the growth of the process's resident memory, whose high-water mark Linux lets a process reset;
    memory that earlier work left with the allocator is reused unseen, so the first of two equal runs shows more.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _reset():
        return None
    before = _kilobytes("VmRSS")
    run()
    peak = _kilobytes("VmHWM")
    return None if before is None or peak is None else max(0, peak - before) * 1024


def _reset() -> bool:
    """Return free memory to the system and begin a new high-water mark; False where that is not possible."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return False
    return _STATUS.is_file()


def _kilobytes(field: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return None
