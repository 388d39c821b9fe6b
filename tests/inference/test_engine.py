"""The engine: equal to transformers' generate, independent of batching and order, streaming the same answer."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from support.tiny_models import tiny_image, tiny_vlm
from unclipped.core.errors import CheckpointError, DataError, ImageError, UsageError
from unclipped.data.sample import Sample
from unclipped.encoding.collate import collate_prompts
from unclipped.inference.engine import Engine, find_device
from unclipped.inference.greedy import up_to_end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("engine")
    tiny_vlm(base, seed=4, output=base / "vlm")
    return base / "vlm"


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, device="cpu")


def samples(count: int = 10) -> list[Sample]:
    """Questions of several lengths about images of several sizes, one without an image and one about two."""
    found = []
    for number in range(count):
        images = [tiny_image(16 + 8 * (number % 3), 16 + 8 * (number % 2), offset=number)]
        images = [] if number == 3 else images * 2 if number == 4 else images
        found.append(Sample.qa(f"s{number}", images, "what is this? " + "red " * (number % 4), "blue"))
    return found


def by_generate(engine: Engine, asked: list[Sample], max_new_tokens: int) -> list[list[int]]:
    """The tokens of transformers' own `generate`, one request at a time."""
    rows = []
    for sample in asked:
        inputs = collate_prompts([engine.encode(sample)], engine.processor)
        with torch.no_grad():
            row = engine.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
        rows.append(up_to_end(row[inputs["input_ids"].shape[1] :], engine.end_ids))
    return rows


def test_equals_generate_whatever_the_batch(engine: Engine) -> None:
    asked = samples()
    expected = by_generate(engine, asked, 12)
    assert len({tuple(row) for row in expected}) > 3  # the rows are worth comparing
    assert engine._batch([engine.encode(sample) for sample in asked], 12) == expected
    texts = [engine._text(row).strip() for row in expected]
    for batch_size in (1, 3, 16):
        assert engine.generate(asked, max_new_tokens=12, batch_size=batch_size) == texts


def test_rows_end_each_at_its_own_end_token(folder: Path) -> None:
    asked = samples()
    engine = Engine(folder, device="cpu")
    free = by_generate(engine, asked, 12)
    common = Counter(token for row in free for token in row[2:9]).most_common(1)[0][0]
    engine.model.generation_config.eos_token_id = [1, common]
    engine = Engine(engine.model, engine.processor, device="cpu")
    expected = by_generate(engine, asked, 12)
    lengths = {len(row) for row in expected}
    assert len(lengths) > 1
    assert min(lengths) < 12
    assert engine._batch([engine.encode(sample) for sample in asked], 12) == expected


def test_order_of_the_answers_is_that_of_the_requests(engine: Engine) -> None:
    asked = samples()
    straight = engine.generate(asked, max_new_tokens=8, batch_size=4)
    assert engine.generate(asked[::-1], max_new_tokens=8, batch_size=4) == straight[::-1]


def test_windows_do_not_change_answers(engine: Engine) -> None:
    asked = samples(40)
    counted: list[int] = []
    answers = engine.generate(asked, max_new_tokens=3, batch_size=2, on_progress=counted.append)
    assert answers == engine.generate(asked, max_new_tokens=3, batch_size=40)
    assert sum(counted) == 40


def test_the_gold_answer_is_not_seen(engine: Engine) -> None:
    with_answer = Sample.qa("a", [tiny_image()], "what is this?", "blue circle")
    without = Sample.qa("a", [tiny_image()], "what is this?", None)
    assert engine.encode(with_answer).input_ids == engine.encode(without).input_ids


def test_stream_joins_to_the_answer(engine: Engine) -> None:
    for sample in samples(6):
        pieces = list(engine.stream(sample, max_new_tokens=12))
        assert "".join(pieces).strip() == engine.generate([sample], max_new_tokens=12)[0]


def test_stream_stops_when_closed_and_passes_errors_on(engine: Engine) -> None:
    stream = engine.stream(samples(1)[0], max_new_tokens=200)
    next(stream, None)
    stream.close()
    with pytest.raises(ImageError):
        next(engine.stream(Sample.qa("x", ["missing.png"], "?", None)))


def test_messages_equal_samples(engine: Engine, tmp_path: Path) -> None:
    tiny_image().save(tmp_path / "a.png")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "what is this?"}],
        }
    ]
    sample = Sample.qa("a", [tiny_image()], "what is this?", None)
    assert engine.encode(messages).input_ids == engine.encode(sample).input_ids
    assert engine.generate([messages], max_new_tokens=6) == engine.generate([sample], max_new_tokens=6)


def test_several_turns(engine: Engine) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": tiny_image()}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red circle"},
        {"role": "user", "content": "how many?"},
    ]
    example = engine.encode(messages)
    text = engine.processor.tokenizer.decode(example.input_ids)
    assert "red circle" in text
    assert text.endswith("how many?<|assistant|>")
    assert isinstance(engine.generate([messages], max_new_tokens=4)[0], str)


def test_no_requests(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_fingerprint_tells_models_apart(engine: Engine, folder: Path) -> None:
    again = Engine(folder, device="cpu")
    assert again.fingerprint() == engine.fingerprint()
    with torch.no_grad():
        next(again.model.model.connector.parameters()).add_(1e-3)
    assert again.fingerprint() != engine.fingerprint()


def test_answers_end_where_the_positions_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = samples(1)[0]
    length = len(engine.encode(sample).input_ids)
    text_config = engine.model.config.get_text_config()
    monkeypatch.setattr(text_config, "max_position_embeddings", length + 2)
    free = Engine(engine.model, engine.processor, device="cpu")
    monkeypatch.setattr(free, "end_ids", {-1})
    assert len(free._batch([free.encode(sample)], 50)[0]) == 2
    monkeypatch.setattr(text_config, "max_position_embeddings", length)
    with pytest.raises(DataError, match="leaves no room for an answer"):
        free.generate([sample])


def test_bad_use(engine: Engine, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="needs its processor"):
        Engine(engine.model)
    with pytest.raises(UsageError, match="expected auto, cpu"):
        find_device("gpu")
    with pytest.raises(UsageError, match="not available"):
        find_device("cuda:99")
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        Engine(tmp_path / "broken")
