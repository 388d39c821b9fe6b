"""The way of an image to an answer and of a sample to a loss: the files they pass through are those on the page."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from support.tiny_models import tiny_image, tiny_vlm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "unclipped"


def files_of(work: Callable[[], Any]) -> list[str]:
    """Files of the package outside `core/` in which `work` calls a function, in the order of the first calls."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] != "core":
                found.setdefault(str(path.relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return list(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return tiny_vlm(tmp_path_factory.mktemp("model"))[:2]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    tiny_image(20, 40).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def from_image_to_answer(model: tuple[Any, Any], picture: Path) -> list[str]:
    from unclipped.data.sample import ImagePart, Sample, TextPart, Turn
    from unclipped.inference.engine import Engine

    engine = Engine(*model, device="cpu")
    sample = Sample("question", (Turn("user", (ImagePart(picture), TextPart("what is this"))),))
    return files_of(lambda: engine.generate([sample], max_new_tokens=2))


def from_sample_to_loss(model: tuple[Any, Any], picture: Path) -> list[str]:
    from unclipped.data.config import DataConfig
    from unclipped.data.mixture import Mixture
    from unclipped.objectives.answer import AnswerObjective
    from unclipped.training.examples import MixtureExamples

    row = {"id": "one", "image": picture.name, "question": "what is this", "answer": "a circle"}
    rows = picture.with_name("train.jsonl")
    rows.write_text(json.dumps(row) + "\n")
    config = DataConfig.model_validate({"sources": [{"source": str(rows)}]})
    vlm, processor = model
    objective = AnswerObjective(vlm)

    def work() -> None:
        batch = MixtureExamples(Mixture(config, 0), processor).batch([0])
        batch.pop("sample_ids", None)
        objective(**batch)["loss"].backward()

    return files_of(work)


def on_the_page(title: str) -> list[str]:
    """The files that a section of the page on architecture lists, in its order."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `([a-z_/]+\.py)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("title", "traced"),
    [("From an image to an answer", from_image_to_answer), ("From a sample to a loss", from_sample_to_loss)],
)
def test_the_page_lists_the_files_on_the_way(
    title: str, traced: Callable[[tuple[Any, Any], Path], list[str]], model: tuple[Any, Any], picture: Path
) -> None:
    traced(model, picture)  # what is registered or cached at first use is not on the way
    found = traced(model, picture)
    assert on_the_page(title) == found, "\n".join(found)
