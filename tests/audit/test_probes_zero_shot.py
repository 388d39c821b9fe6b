"""Prompt ensembles and retrieval against the formulas in float64 and against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import unclipped.audit.zero_shot as zero_shot
from unclipped.audit.data import LabelledSet
from unclipped.audit.text_probes import names_of
from unclipped.audit.zero_shot import (
    class_weights,
    recall_at_k,
    require_text_side,
    zero_shot_predict,
)
from unclipped.core.errors import DataError, UsageError


class Towers:
    """Embeddings drawn from a hash of the text; images embed as they are."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode_images(self, pixels: Tensor) -> Tensor:
        return pixels

    def encode_text(self, texts: list[str]) -> Tensor:
        self.seen += texts
        return torch.stack([torch.tensor(embedding(text)) for text in texts]).float()


def embedding(text: str) -> np.ndarray:
    return np.random.default_rng(list(text.encode())).normal(size=6) * len(text)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_class_weights_equal_the_formula(batch_size: int) -> None:
    classes, templates = ["dress", "hat", "t-shirt"], ["{}", "a photo of a {}.", "one {} on a table"]
    found = class_weights(Towers(), classes, templates, batch_size)
    for number, name in enumerate(classes):
        prompts = np.stack([embedding(template.format(name)) for template in templates])
        mean = (prompts / np.linalg.norm(prompts, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(found[number].numpy(), mean / np.linalg.norm(mean), atol=1e-6)


def test_images_go_to_the_nearest_class() -> None:
    weights = class_weights(Towers(), ["a", "b", "c", "d"])
    images = weights[[2, 0, 3]] * torch.tensor([[5.0], [0.1], [1.0]])
    assert zero_shot_predict(images, weights).tolist() == [2, 0, 3]


def test_wrong_templates() -> None:
    with pytest.raises(UsageError, match=r"template 'a photo': expected exactly one \{\}"):
        class_weights(Towers(), ["a"], ["a photo"])
    with pytest.raises(UsageError, match="at least one prompt"):
        class_weights(Towers(), ["a"], [])


def test_an_encoder_without_text_side() -> None:
    towers = Towers()
    assert require_text_side(towers, "model") is towers
    with pytest.raises(UsageError, match=r"my-vit: zero-shot and retrieval need a text side .* Identity lacks"):
        require_text_side(torch.nn.Identity(), "my-vit")


def brute_force(similarity: np.ndarray, owner: list[int], k: int) -> tuple[list[float], list[float]]:
    """Hits for each image and for each text; a wrong item as similar as the right one stands before it."""
    images = []
    for i, row in enumerate(similarity):
        order = sorted(range(len(owner)), key=lambda t: (-row[t], owner[t] == i))
        images.append(float(any(owner[t] == i for t in order[:k])))
    texts = []
    for t, column in enumerate(similarity.T):
        order = sorted(range(len(similarity)), key=lambda i: (-column[i], owner[t] == i))
        texts.append(float(owner[t] in order[:k]))
    return images, texts


@settings(max_examples=40, deadline=None)
@given(
    captions=st.lists(st.integers(1, 3), min_size=2, max_size=7),
    at_once=st.sampled_from([1, 10**6]),
    seed=st.integers(0, 99),
)
def test_recall_equals_brute_force(captions: list[int], at_once: int, seed: int) -> None:
    owner = [image for image, count in enumerate(captions) for _ in range(count)]
    generator = np.random.default_rng(seed)
    generator.shuffle(owner)
    # Small whole numbers along one axis each: many exact ties.
    images = np.eye(3)[generator.integers(0, 3, len(captions))]
    texts = np.eye(3)[generator.integers(0, 3, len(owner))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "_SIMILARITIES_AT_ONCE", at_once)
        found = recall_at_k(torch.tensor(images), torch.tensor(texts), owner, ks=(1, 2))
    for k in (1, 2):
        image_hits, text_hits = brute_force(images @ texts.T, owner, k)
        assert found["image_to_text"][k].tolist() == image_hits
        assert found["text_to_image"][k].tolist() == text_hits


def test_one_similarity_for_all_finds_nothing() -> None:
    found = recall_at_k(torch.ones(4, 2), torch.ones(4, 2), [0, 1, 2, 3], ks=(1, 4))
    assert found["image_to_text"][1].sum() == 0
    assert found["text_to_image"][4].sum() == 4


@pytest.mark.parametrize(
    ("owner", "ks", "message"),
    [
        ([0, 0, 1], (1,), "image 2 has no text"),
        ([0, 1], (1,), "found 2 for 3 texts"),
        ([0, 1, 2], (5,), "recall at 5: expected 1 to 3"),
        ([0, 1, 2], (0,), "expected 1 to 3"),
    ],
)
def test_wrong_pairs(owner: list[int], ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recall_at_k(torch.randn(3, 2), torch.randn(3, 2), owner, ks)


def test_a_text_of_an_image_that_is_not_there() -> None:
    with pytest.raises(DataError, match="names image 7, but there are 2 images"):
        recall_at_k(torch.randn(2, 2), torch.randn(3, 2), [0, 1, 7])


def named(folder: Path, text: str | None, classes: tuple[str, ...] = ("n01", "n02")) -> dict[str, str]:
    if text is not None:
        (folder / "names.txt").write_text(text)
    return names_of("names.txt", LabelledSet(str(folder), classes, (), ()))


def test_names_of_classes_from_a_file_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "n01 tench, Tinca tinca\n\nn02 great white shark, man-eater\nn03 not asked for\n"
    assert named(tmp_path, text) == {"n01": "tench", "n02": "great white shark", "n03": "not asked for"}
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named(tmp_path / "inner", None)["n01"] == "tench", "a path of its own serves where the folder has none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "names_file names.txt: no such file, neither in .* nor as a path of its own"),
        ("n01 tench\nn02\n", "names.txt, line 2: expected a label and a name, found 'n02'"),
        ("n01 tench\n", "names.txt: no line for class 'n02' of .*; add it, or name it in zero_shot.names"),
    ],
)
def test_files_of_names_that_do_not_serve(text: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        named(tmp_path, text)
