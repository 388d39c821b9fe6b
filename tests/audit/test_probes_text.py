"""Zero-shot classification and retrieval in a whole evaluation, with the text side of a pretrained encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from support.tiny_models import tiny_encoder
from unclipped.audit.config import EncoderEvaluationConfig, RetrievalConfig, ZeroShotConfig
from unclipped.audit.runner import evaluate_encoder
from unclipped.audit.text_probes import load_captioned
from unclipped.audit.zero_shot import class_weights
from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.text_side import load_text_side
from unclipped.training.config import OptimizerConfig, PretrainConfig, TokenizerConfig, TrainingConfig
from unclipped.training.pretrain import pretrain

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
SHORT: dict[str, Any] = {"bootstrap_samples": 100, "device": "cpu", "baseline": True, "probes": []}


def write_split(folder: Path, split: str, rows: list[tuple[str, str]]) -> None:
    """(name of an image, its text) → `split`.jsonl; an image is of the colour that its name starts with."""
    lines = []
    for number, (image, text) in enumerate(rows):
        noise = np.random.default_rng(list(f"{split}{image}".encode())).integers(-20, 20, (16, 16, 3))
        pixels = np.clip(np.array(COLOURS[image.split("-")[0]]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{split}-{image}.png")
        row = {"id": f"{split}-{number}", "image": f"{split}-{image}.png", "question": "colour?", "answer": text}
        lines.append(json.dumps(row))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and test: the colour as label; pairs: two captions an image."""
    folder = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 12), ("test", 8)):
        names = [list(COLOURS)[number % 4] for number in range(count)]
        write_split(folder, split, [(f"{name}-{number}", name) for number, name in enumerate(names)])
    write_split(folder, "pairs", [(name, text) for name in COLOURS for text in (f"a {name} thing", f"all {name}")])
    return folder


@pytest.fixture(scope="module")
def encoder(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    given = PretrainConfig(
        objective="contrastive",
        shape={"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        image_size=16,
        pairs=PairsConfig(embedding_size=8, context_length=16, text_width=16, text_layers=1, text_heads=2),
        data=DataConfig(sources=(SourceConfig(source=str(colours), split="pairs"),)),
        tokenizer=TokenizerConfig(vocabulary_size=280),
        steps=60,
        batch_size=8,
        learning_rate=3e-3,
        training=TrainingConfig(optimizer=OptimizerConfig(weight_decay=0.1), threads=1, device="cpu"),
    )
    return str(pretrain(given, tmp_path_factory.mktemp("run") / "run").model_folder)


def config(encoder: str, colours: Path, **changes: Any) -> EncoderEvaluationConfig:
    fields = {
        "encoder": encoder,
        "data": {"source": str(colours)},
        "zero_shot": {"templates": ["a {} thing", "all {}"]},
    }
    return EncoderEvaluationConfig(**(fields | SHORT | changes))


def test_what_was_learned_stands_beside_random_weights_and_the_majority(
    encoder: str, colours: Path, tmp_path: Path
) -> None:
    pairs = {"source": str(colours), "split": "pairs", "k": [1, 3]}
    given = config(encoder, colours, probes=["knn"], knn={"k": [1]}, raw_size=4, retrieval=pairs)
    results = evaluate_encoder(given, tmp_path, console=Console(quiet=True))
    assert results.of("zero_shot").figure.value == 1.0
    assert results.of("zero_shot", "majority").figure.value == 0.25
    assert results.of("zero_shot", "random_weights").figure.value < 1.0
    assert results.differences["zero_shot"]["majority"].value == 0.75
    assert results.of("knn").figure.count == 8, "other probes are run beside it"
    for way, count in (("image_to_text", 4), ("text_to_image", 8)):
        row = results.of(f"retrieval_{way}_at_1").figure
        assert (row.value, row.count, row.clusters) == (1.0, count, 4)
        assert results.of(f"retrieval_{way}_at_3").figure.value == 1.0
        assert f"retrieval_{way}_at_1" in results.differences
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["data"]["retrieval"] | {"source": ""} == {
        "source": "", "images": 4, "captions": 8, "captions_of_several_images": 0,
    }  # fmt: skip
    assert found["probes"]["retrieval_image_to_text_at_1"]["encoder"]["recall"] == 1.0
    report = (tmp_path / "report.md").read_text()
    for text in (
        "| zero-shot | most frequent class |",
        "| image to text R@1 | random weights |",
        "4 images, 8 captions",
    ):
        assert text in report
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert sum(row["probe"] == "zero_shot" for row in rows) == 3 * 8
    again = evaluate_encoder(given, tmp_path / "again", console=Console(quiet=True))
    assert again.to_dict() == results.to_dict()


def test_class_weights_of_a_text_side_equal_the_rule_in_float64(encoder: str) -> None:
    """Embeddings of one class's prompts: each to unit length, their mean, that to unit length (arXiv 2103.00020)."""
    side = load_text_side(encoder)
    classes, templates = list(COLOURS), ["a {} thing", "all {}", "{}"]
    expected = np.empty((4, 8))
    for number, name in enumerate(classes):
        prompts = [template.replace("{}", name) for template in templates]
        rows = np.concatenate([side.encode_text([prompt]).numpy() for prompt in prompts]).astype(np.float64)
        rows /= np.sqrt((rows**2).sum(axis=1, keepdims=True))
        mean = rows.sum(axis=0) / len(rows)
        expected[number] = mean / np.sqrt((mean**2).sum())
    np.testing.assert_allclose(class_weights(side, classes, templates).numpy(), expected, atol=1e-6)


def test_names_stand_for_labels(encoder: str, colours: Path, tmp_path: Path) -> None:
    """Exchanging the words of two classes exchanges what is predicted, and nothing else."""
    swapped = {"templates": ["a {} thing"], "names": {"red": "green", "green": "red"}}
    results = evaluate_encoder(config(encoder, colours, zero_shot=swapped), tmp_path, console=Console(quiet=True))
    assert results.of("zero_shot").parts == {"blue": 1.0, "green": 0.0, "red": 0.0, "white": 1.0}


def test_random_weights_come_from_the_seed_alone(encoder: str) -> None:
    state = torch.get_rng_state()
    one, two, other = (load_text_side(encoder, random_seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(one.encode_text(["red"]), two.encode_text(["red"]), rtol=0, atol=0)
    pixels = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
    torch.testing.assert_close(one.encode_images(pixels), two.encode_images(pixels), rtol=0, atol=0)
    assert not torch.allclose(one.encode_images(pixels), other.encode_images(pixels))
    assert not torch.allclose(one.encode_text(["red"]), load_text_side(encoder).encode_text(["red"]))


def test_captions_of_several_images_are_counted_and_named(encoder: str, colours: Path, tmp_path: Path) -> None:
    given = {"data": None, "zero_shot": None, "retrieval": {"source": str(colours), "k": [1]}}
    assert load_captioned(RetrievalConfig(source=str(colours), k=(1,))).captions_of_several_images == 8
    results = evaluate_encoder(config(encoder, colours, **given), tmp_path, console=Console(quiet=True))
    assert results.of("retrieval_text_to_image_at_1").figure.value <= 0.5
    assert (
        "8 captions for retrieval are, word for word, those of another image too"
        in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"zero_shot": {"names": {"pink": "rose"}}},
            UsageError,
            r"zero_shot.names: 'pink' is no class of .* blue, green",
        ),
        (
            {"retrieval": {"source": "PAIRS", "split": "pairs"}},
            DataError,
            "k 10 of 4 different images; lower retrieval.k",
        ),
        ({"retrieval": {"source": "generated:shapes", "split": "none"}}, UsageError, "split"),
    ],
)
def test_what_does_not_fit_the_data(
    changes: dict[str, Any], error: type[Exception], message: str, encoder: str, colours: Path, tmp_path: Path
) -> None:
    if changes.get("retrieval", {}).get("source") == "PAIRS":
        changes = {"retrieval": changes["retrieval"] | {"source": str(colours)}}
    with pytest.raises(error, match=message):
        evaluate_encoder(config(encoder, colours, **changes), tmp_path, console=Console(quiet=True))


def test_an_encoder_without_a_text_side(colours: Path, tmp_path: Path) -> None:
    vision = str(tiny_encoder(tmp_path / "vision"))
    with pytest.raises(UsageError, match=r"vision: zero_shot and retrieval need an encoder folder with a text side"):
        evaluate_encoder(config(vision, colours), tmp_path / "out", console=Console(quiet=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero_shot": {}, "segmentation": {}}, "zero_shot: its classes and images are those of data"),
        ({"retrieval": {"source": "x", "k": []}}, "at least 1 item"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderEvaluationConfig(encoder="x", **fields)
    with pytest.raises(ValueError, match=r"'a photo': expected exactly one \{\}"):
        ZeroShotConfig(templates=("a photo",))
