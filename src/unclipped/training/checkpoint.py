"""Checkpoints of a training run: whole folders, written under a temporary name and renamed, the newest one kept."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unclipped.core.errors import CheckpointError, UnclippedError
from unclipped.training.parallel import barrier

STATE, POSITION, PARTIAL = "state.pt", "position.json", ".partial"


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    stage_index: int
    """Stage of the checkpoint, from 0."""
    stage: str
    """Its name."""
    step: int
    """Optimiser steps done in that stage."""
    is_finished: bool
    """Whether the stage has ended; then the checkpoint holds weights only."""
    folder: Path
    """Where the checkpoint lies."""


def latest_checkpoint(folder: Path) -> Position | None:
    """The newest whole checkpoint under `folder`, None when there is none. Raises CheckpointError for a damaged one."""
    found = []
    for path in folder.glob("*/" + POSITION):
        if path.parent.name.startswith(PARTIAL):
            continue
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            found.append(Position(**fields, folder=path.parent))
        except (json.JSONDecodeError, TypeError) as error:
            raise CheckpointError(f"{path}: not a checkpoint position ({error}); remove {path.parent}") from None
    return max(found, key=lambda p: (p.stage_index, p.is_finished, p.step), default=None)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of Python, NumPy and torch (and of `device` when it is CUDA)."""
    version, keys, place, has_gauss, gauss = np.random.get_state()  # type: ignore[misc]
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [version, torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_gauss, gauss],
        "torch": torch.random.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the random generators to `state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def write_checkpoint(
    folder: Path,
    *,
    stage_index: int,
    stage: str,
    step: int,
    is_finished: bool,
    state: dict[str, Any],
    own_random_state: dict[str, Any],
    trainer_state_json: str,
    rank: int,
) -> Path:
    """Write a checkpoint and remove older ones; with several processes every rank calls this.

    Rank 0 writes `state`, each rank its random state. Returns the checkpoint's folder. Raises UnclippedError when the
    disk is full or cannot be written; the older checkpoint is then still there.
    """
    name = f"{stage_index:02d}-{stage}-" + ("done" if is_finished else f"step-{step:08d}")
    partial, final = folder / f"{PARTIAL}-{name}", folder / name
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        torch.save(own_random_state, partial / f"random-{rank}.pt")
        if rank == 0:
            torch.save(state, partial / STATE)
            (partial / "trainer_state.json").write_text(trainer_state_json, encoding="utf-8")
            position = {"stage_index": stage_index, "stage": stage, "step": step, "is_finished": is_finished}
            (partial / POSITION).write_text(json.dumps(position), encoding="utf-8")
        barrier()
        if rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for other in folder.iterdir():
                if other != final and other.is_dir():
                    shutil.rmtree(other)
        barrier()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its writer
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UnclippedError(
            f"cannot write the checkpoint {final}: {reason}; free space or choose another --output"
        ) from None
    return final


def read_state(folder: Path) -> dict[str, Any]:
    """The tensors and numbers of a checkpoint, on the CPU. Raises CheckpointError when it cannot be read."""
    return _load(folder / STATE)


def read_random_state(folder: Path, rank: int) -> dict[str, Any]:
    """The random state of one process. Raises CheckpointError when this rank had none: start as many processes."""
    path = folder / f"random-{rank}.pt"
    if not path.is_file():
        saved = len(list(folder.glob("random-*.pt")))
        raise CheckpointError(
            f"{folder}: written by {saved} process(es), so rank {rank} has no random state; use {saved}"
        )
    return _load(path)


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); start anew in another folder"
        ) from None
