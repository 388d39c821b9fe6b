"""Engine, chat and evaluation with prefills under a pattern."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from support.tiny_models import tiny_image, tiny_vlm
from unclipped.attention.config import SparseConfig
from unclipped.core.errors import UsageError
from unclipped.data.sample import Sample
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.runner import evaluate_model
from unclipped.inference.chat import chat
from unclipped.inference.engine import Engine

SMALL = {"fallback": "never", "key_block": 4, "query_block": 8}
FULL = SparseConfig(pattern="full", **SMALL)  # type: ignore[arg-type]
NARROW = SparseConfig(pattern="sink(4) + window2d(0, 0)", **SMALL)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("engine")
    tiny_vlm(base, seed=4, output=base / "vlm")
    return base / "vlm"


def questions() -> list[Sample]:
    images = [tiny_image(32 + 8 * (n % 3), 48, offset=n) for n in range(6)]
    return [Sample.qa(f"s{n}", [image], "what is this? " + "red " * n, "blue") for n, image in enumerate(images)]


def test_a_full_pattern_answers_as_dense_does(folder: Path) -> None:
    dense, full = Engine(folder, device="cpu"), Engine(folder, device="cpu", sparse=FULL)
    assert full.generate(questions(), max_new_tokens=8, batch_size=4) == dense.generate(questions(), max_new_tokens=8)
    assert full.sparse is not None
    summary = full.sparse.summary()
    assert summary is not None
    assert (summary.sparse_layers, summary.layers) == (2, 2)


def test_engines_of_other_patterns_are_told_apart(folder: Path) -> None:
    found = {Engine(folder, device="cpu", sparse=sparse).fingerprint() for sparse in (None, FULL, NARROW)}
    assert len(found) == 3


def test_chat_says_what_the_prefill_did(folder: Path, tmp_path: Path) -> None:
    tiny_image(48, 48).save(tmp_path / "a.png")
    out = io.StringIO()
    chat(folder, [tmp_path / "a.png"], "what?", Console(file=out, width=200), max_new_tokens=4, sparse=NARROW)
    assert "(prefill: 2 of 2 layers sparse, density 0." in out.getvalue()
    out = io.StringIO()
    auto = SparseConfig(pattern="sink(4)")
    chat(folder, [tmp_path / "a.png"], "what?", Console(file=out, width=200), max_new_tokens=4, sparse=auto)
    assert "0 of 2 layers sparse, density 1.00; dense because" in out.getvalue()
    assert "tokens are fewer than 1024" in out.getvalue()


def test_evaluation_keeps_what_the_prefill_did(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number in range(4):
        tiny_image(48, 48, offset=number).save(data / f"{number}.png")
        rows.append({"id": f"q{number}", "image": f"{number}.png", "question": "what?", "answer": "blue"})
    (data / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(name="t", source={"source": str(data), "split": "val"}, max_new_tokens=4)  # type: ignore[arg-type]
    config = EvaluationConfig(tasks=(task,), bootstrap_samples=100, sparse=NARROW)
    quiet = Console(file=io.StringIO(), width=120)
    evaluate_model(folder, config, tmp_path / "out", device="cpu", console=quiet)
    kept = json.loads((tmp_path / "out" / "sparse.json").read_text())
    assert kept["pattern"] == "sink(size=4) + window2d(rows=0, columns=0)"
    assert kept["density"] < 1.0
    with pytest.raises(UsageError, match="other"):  # answers of another pattern are not taken over
        evaluate_model(
            folder,
            config.model_copy(update={"sparse": FULL}),
            tmp_path / "out",
            device="cpu",
            resume=True,
            console=quiet,
        )


def test_bad_pattern_is_refused_when_the_engine_is_made(folder: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'window'"):
        Engine(folder, device="cpu", sparse=SparseConfig(pattern="windw(4)"))
    with pytest.raises(ValueError, match="must be a multiple of key_block"):
        SparseConfig(pattern="full", key_block=100)
