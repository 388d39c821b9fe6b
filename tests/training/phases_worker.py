"""Run by torchrun in test_phases_distributed.py: tiny pretrainings in phases, as the arguments say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from phase_support import kind_of, tiny
from torchrun_support import leave

from unclipped.training.pretrain import pretrain


class Stopped(Exception):
    """Raised in place of a crash."""


def train(folder: Path, options: dict[str, Any]) -> None:
    """One run into `folder / options["name"]`; with `crash_after` it ends after so many steps, without a word."""
    kind = kind_of(options["objective"])
    original, seen = kind.after_step, []

    def after_step(self: Any) -> None:
        original(self)
        seen.append(1)
        if len(seen) == options.get("crash_after"):
            raise Stopped

    training = {"parallel": options.get("parallel", "ddp"), "save_every_steps": options.get("crash_after")}
    config = tiny(options["objective"], folder, training=training, **options.get("fields", {}))
    kind.after_step = after_step
    try:
        pretrain(config, folder / options["name"], resume=options.get("resume", False))
    except Stopped:
        return
    finally:
        kind.after_step = original


def main() -> None:
    torch.set_num_threads(1)
    for options in json.loads(sys.argv[1]):
        train(Path(sys.argv[2]), options)
    leave()


if __name__ == "__main__":
    main()
