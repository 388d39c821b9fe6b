"""Small trainings: seeded random tokens and a tiny language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.tiny_models import tiny_text_config


class RandomTokens:
    """Example i: tokens drawn from seed i, with labels of differing number."""

    def __init__(self, length: int = 12, vocabulary: int = 40) -> None:
        self.length, self.vocabulary = length, vocabulary

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = [
            torch.randint(2, self.vocabulary, (self.length,), generator=torch.Generator().manual_seed(i))
            for i in indices
        ]
        ids = torch.stack(rows)
        labels = ids.clone()
        for row, index in enumerate(indices):
            labels[row, : index % 7] = -100  # so that tokens per micro-batch differ
        return {"input_ids": ids, "labels": labels, "sample_ids": [f"sample-{i}" for i in indices]}

    def lengths(self, indices: Sequence[int]) -> list[int]:
        return [(i * 7919) % 23 for i in indices]


def small_language_model(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_text_config(vocab_size=40, **overrides))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module | dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    theirs = other if isinstance(other, dict) else other.state_dict()
    differing = [name for name, value in one.state_dict().items() if not torch.equal(value, theirs[name])]
    assert not differing, f"weights differ: {differing}"
