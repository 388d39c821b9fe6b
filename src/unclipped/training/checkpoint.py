"""Checkpoints of a training run: whole folders, written under a temporary name and renamed, the newest one kept.

The last file of a checkpoint is `digests.json`, with size and digest of every other one; they are compared before
anything is resumed from. `checkpoints.json` beside the folder of checkpoints says which one was written last, so that
a resumed run knows of one that is gone.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unclipped.core.digest import file_digest
from unclipped.core.documents import read_json
from unclipped.core.errors import CheckpointError, DataError, UnclippedError, guarded
from unclipped.core.files import write_json
from unclipped.training.parallel import barrier

STATE, POSITION, PARTIAL = "state.pt", "position.json", ".partial"
TRAINER_STATE, DIGESTS, NEWEST = "trainer_state.json", "digests.json", "checkpoints.json"


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
    """The newest whole checkpoint under `folder`, None when there is none.

    Raises CheckpointError for one that is damaged, that is not whole, or that was written and is gone.
    """
    folders = [path for path in sorted(folder.glob("*/")) if not path.name.startswith(PARTIAL)]
    found = [_position(path) for path in folders if (path / POSITION).is_file()]
    newest = max(found, key=lambda p: (p.stage_index, p.is_finished, p.step), default=None)
    written = (-1, -1)
    if (path := folder.parent / NEWEST).exists():
        fields = read_json(path, error=CheckpointError, remedy="start a new run in another --output")
        written = (fields.get("stage_index"), fields.get("step"))
        if not all(type(number) is int for number in written):
            raise CheckpointError(f"{path}: names no stage and step; start a new run in another --output")
    # Older ones that were being removed when the run ended may be in pieces; the newest must be whole.
    broken = [path for path in folders if not (path / POSITION).is_file()]
    if broken and (newest is None or (newest.stage_index, newest.step) < written):
        raise CheckpointError(f"{broken[-1]}: {POSITION} is missing from this checkpoint; {_remedy(broken[-1])}")
    if newest is None and written > (-1, -1):
        raise CheckpointError(
            f"{folder}: the checkpoint of stage {written[0]}, step {written[1]} was written here and is gone; put it "
            "back, or start a new run in another --output"
        )
    return newest


def _position(folder: Path) -> Position:
    path = folder / POSITION
    try:
        fields = read_json(path)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise CheckpointError(f"{path}: not a checkpoint position ({reason}); {_remedy(folder)}") from None
    kinds = {"stage_index": int, "stage": str, "step": int, "is_finished": bool}
    if set(fields) != set(kinds) or any(type(fields[name]) is not kind for name, kind in kinds.items()):
        raise CheckpointError(f"{path}: not a checkpoint position ({', '.join(kinds)}); {_remedy(folder)}")
    position = Position(**fields, folder=folder)
    if folder.name != _name(position.stage_index, position.stage, position.step, position.is_finished):
        raise CheckpointError(
            f"{path}: says stage {position.stage_index} '{position.stage}', step {position.step}, and the folder is "
            f"called {folder.name}; {_remedy(folder)}"
        )
    return position


def _name(stage_index: int, stage: str, step: int, is_finished: bool) -> str:
    return f"{stage_index:02d}-{stage}-" + ("done" if is_finished else f"step-{step:08d}")


def _remedy(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    others = [path.name for path in sorted(folder.parent.glob("*/")) if path != folder and (path / POSITION).is_file()]
    if others:
        return f"remove {folder} to resume from {others[-1]}, or start a new run in another --output"
    return "put back a copy of it, or start a new run in another --output"


def verify_checkpoint(position: Position) -> bool:
    """Compare every file of a checkpoint with its digest; False when it was written without digests.

    Raises CheckpointError that names the file that is missing or has another content, or the step that differs.
    """
    folder = position.folder
    state = read_json(folder / TRAINER_STATE, error=CheckpointError, remedy=_remedy(folder))
    if not position.is_finished and state.get("global_step") != position.step:
        raise CheckpointError(
            f"{folder / TRAINER_STATE}: global_step is {state.get('global_step')!r}, expected {position.step} as "
            f"{POSITION} says; {_remedy(folder)}"
        )
    path = folder / DIGESTS
    if not path.exists():
        return False
    kept = read_json(path, error=CheckpointError, remedy=_remedy(folder))
    if kept.get("step") != position.step or kept.get("stage_index") != position.stage_index:
        raise CheckpointError(
            f"{path}: of stage {kept.get('stage_index')!r}, step {kept.get('step')!r}, expected "
            f"{position.stage_index} and {position.step} as {POSITION} says; {_remedy(folder)}"
        )
    verify_files(folder, kept.get("files"), path, _remedy(folder))
    return True


def digests_of(folder: Path) -> dict[str, list[Any]]:
    """{file: [bytes, digest]} of every file below `folder`, read whole."""
    return {
        str(path.relative_to(folder)): [path.stat().st_size, file_digest(path)[0]]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def verify_files(folder: Path, kept: Any, where: Path, remedy: str) -> None:
    """Compare the files of `folder` with what `digests_of` said of them, as it was kept in `where`.

    Raises CheckpointError that names the file which is missing or has another content.
    """
    pairs = list(kept.values()) if isinstance(kept, dict) else []
    if not pairs or not all(isinstance(pair, list) and [type(one) for one in pair] == [int, str] for pair in pairs):
        raise CheckpointError(f"{where}: holds no digests of files; {remedy}")
    for name, (size, digest) in kept.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; {remedy}")
        if (found := file.stat().st_size) != size:
            raise CheckpointError(f"{file}: has {found:,} bytes, and {size:,} were written; {remedy}")
        try:
            is_same = file_digest(file)[0] == digest
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); {remedy}") from None
        if not is_same:
            raise CheckpointError(f"{file}: its content is not what was written; {remedy}")


def differences(was: Any, now: Any, path: str) -> list[tuple[str, Any, Any]]:
    """(path of keys, value then, value now) wherever two nested values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*was, *(key for key in now if key not in was)]
        return [d for key in keys for d in differences(was.get(key), now.get(key), f"{path}.{key}")]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return [d for i, pair in enumerate(zip(was, now, strict=True)) for d in differences(*pair, f"{path}.{i}")]
    return [] if was == now else [(path, was, now)]


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
    """Set the random generators to `state`. Raises CheckpointError when it is none."""
    with guarded(lambda reason: CheckpointError(f"the random state of the checkpoint is damaged ({reason})")):
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
    name = _name(stage_index, stage, step, is_finished)
    partial, final = folder / f"{PARTIAL}-{name}", folder / name
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        torch.save(own_random_state, partial / f"random-{rank}.pt")
        if rank == 0:
            torch.save(state, partial / STATE)
            (partial / TRAINER_STATE).write_text(trainer_state_json, encoding="utf-8")
            position = {"stage_index": stage_index, "stage": stage, "step": step, "is_finished": is_finished}
            (partial / POSITION).write_text(json.dumps(position), encoding="utf-8")
        barrier()
        if rank == 0:
            place = {"stage_index": stage_index, "step": step}
            write_json(partial / DIGESTS, {**place, "files": digests_of(partial)})
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            write_json(folder.parent / NEWEST, {**place, "stage": stage})
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


_OF_A_STAGE = {
    "objective": dict, "optimizer": dict, "scheduler": dict, "identity": dict, "entry": dict, "window": dict,
    "seconds": float,
}  # fmt: skip
_OF_A_FINISHED_STAGE = {"model": dict, "carried": dict, "identity": dict}


def read_state(folder: Path) -> dict[str, Any]:
    """The tensors and numbers of a checkpoint, on the CPU. Raises CheckpointError when it cannot be read."""
    return _load(folder / STATE, _OF_A_FINISHED_STAGE if folder.name.endswith("-done") else _OF_A_STAGE)


def read_random_state(folder: Path, rank: int) -> dict[str, Any]:
    """The random state of one process. Raises CheckpointError when this rank had none: start as many processes."""
    path = folder / f"random-{rank}.pt"
    if not path.is_file():
        saved = len(list(folder.glob("random-*.pt")))
        raise CheckpointError(
            f"{folder}: written by {saved} process(es), so rank {rank} has no random state; use {saved}"
        )
    return _load(path, {"python": tuple, "numpy": list, "torch": torch.Tensor})


def _load(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    remedy = _remedy(path.parent)
    with guarded(lambda reason: CheckpointError(f"{path}: cannot be read ({reason}); {remedy}")):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{path}: expected a dictionary of {', '.join(kinds)}; {remedy}")
    return found
