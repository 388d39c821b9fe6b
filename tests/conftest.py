"""Fixtures shared by all tests: fixed seeds, one thread, and the real data when it is there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# Started in the background of a script, the test run inherits an ignored SIGINT; tests of Ctrl-C need the usual one.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def _folder(variable: str, default: Path, what: str) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{what} not found: set {variable} to its folder")
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the real data sets; tests that need it skip when it is missing."""
    return _folder("UNCLIPPED_DATA", ROOT.parent / "shared" / "data", "real data sets")


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Folder of golden vectors of independent implementations; tests that need it skip when it is missing."""
    return _folder("UNCLIPPED_GOLDEN", ROOT.parent / "shared" / "golden", "golden vectors")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
