"""Assembled tiny models shared by the tests of this folder; tests that change a model make their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.tiny_models import tiny_vlm


class Assembled(NamedTuple):
    model: Any
    processor: Any
    report: Any
    folder: Path
    """Holds `text` (the language model) and `model` (the assembled folder)."""


@pytest.fixture(scope="session")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    """Encoder made from the language model, native resolution, averaging connector. Not to be changed."""
    folder = tmp_path_factory.mktemp("assembled")
    model, processor, report = tiny_vlm(folder, "llm", connector="average(1x2) + mlp(2)", output=folder / "model")
    return Assembled(model, processor, report, folder)
