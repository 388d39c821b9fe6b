"""k-nearest neighbours against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import unclipped.audit.knn as knn
from unclipped.audit.knn import knn_predict
from unclipped.core.errors import UsageError


def reference(queries: np.ndarray, bank: np.ndarray, labels: np.ndarray, classes: int, k: int, t: float) -> np.ndarray:
    predicted = []
    for query in queries.astype(np.float64):
        cosine = bank.astype(np.float64) @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        scores = np.zeros(classes)
        for neighbour in np.argsort(-cosine, kind="stable")[:k]:
            scores[labels[neighbour]] += np.exp(cosine[neighbour] / t)
        predicted.append(int(scores.argmax()))
    return np.array(predicted)


@pytest.mark.parametrize("at_once", [1, 10**6])
@pytest.mark.parametrize("temperature", [0.07, 0.003, 10.0])
def test_equals_the_formula(at_once: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_SIMILARITIES_AT_ONCE", at_once)
    generator = np.random.default_rng(0)
    bank, queries = generator.normal(size=(60, 5)), generator.normal(size=(25, 5)) * 7
    labels = generator.integers(0, 4, size=60)
    found = knn_predict(torch.tensor(queries), torch.tensor(bank), torch.tensor(labels), 4, [1, 5, 20, 60], temperature)
    for k, predicted in found.items():
        np.testing.assert_array_equal(predicted.numpy(), reference(queries, bank, labels, 4, k, temperature))


def test_more_neighbours_than_images() -> None:
    with pytest.raises(UsageError, match=r"knn\.k: 9 neighbours asked for, but only 3 images"):
        knn_predict(torch.randn(1, 2), torch.randn(3, 2), torch.tensor([0, 1, 0]), 2, [1, 9])
