"""Arms that train until they are asked to stop: `python arms_worker.py FOLDER [ARM…]` runs them side by side."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

from unclipped.core.errors import UnclippedError
from unclipped.studies.arms import run_side_by_side
from unclipped.training.interrupt import StopRequest, TrainingInterrupted


def train(root: str, name: str) -> None:
    """Leave a file with the process's number; when asked to stop, save for half a second and say so."""
    folder = Path(root) / name
    if name.startswith("measures"):  # nothing to save
        (folder / "started").write_text(str(os.getpid()))
        time.sleep(60)
        return
    with StopRequest() as stop:
        (folder / "partial").write_text(str(os.getpid()))
        (folder / "partial").rename(folder / "started")
        while not stop.is_set:
            time.sleep(0.02)
        time.sleep(60.0 if name.startswith("slow") else 0.5)
        (folder / "saved").write_text("")
        raise TrainingInterrupted("interrupted after step 7; saved. Go on with the same command and --resume")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    try:
        run_side_by_side({name: root / name for name in sys.argv[2:]}, partial(train, str(root)), at_once=2, say=print)
    except UnclippedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
