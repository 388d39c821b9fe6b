"""The mask of a padded batch is left out where causality alone hides the padding, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unclipped
from support.tiny_models import tiny_vlm
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.objectives.answer import AnswerObjective
from unclipped.training.examples import MixtureExamples

FAMILIES = ("qwen3", "llama", "gemma3_text")


def padded_batch(processor: Any) -> dict[str, Any]:
    """Rows of different lengths."""
    config = DataConfig(sources=(SourceConfig(source="generated:characters"),))
    batch = MixtureExamples(Mixture(config, 0), processor).batch(range(12))
    assert not batch["attention_mask"].all()
    return {name: value for name, value in batch.items() if name != "sample_ids"}


def masks_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the attention mask of each forward of the model."""
    seen: list[Any] = []
    forward = type(model).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["attention_mask"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    return seen


def gradients(objective: AnswerObjective, batch: dict[str, Any]) -> dict[str, Tensor]:
    objective.zero_grad()
    objective(**batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_all_tokens_needs_no_mask(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = tiny_vlm(tmp_path, family=family)
    objective, batch = AnswerObjective(model), padded_batch(processor)
    seen = masks_seen(model, monkeypatch)
    without = gradients(objective, batch)
    monkeypatch.setattr(AnswerObjective, "_is_plainly_causal", lambda self, mask: False)
    masked = gradients(objective, batch)
    assert seen[0] is None
    assert seen[1] is batch["attention_mask"]
    assert without.keys() == masked.keys()
    for name, gradient in without.items():
        torch.testing.assert_close(gradient, masked[name], atol=1e-6, rtol=1e-4, msg=name)


def test_masks_that_say_more_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = tiny_vlm(tmp_path)
    objective, batch = AnswerObjective(model), padded_batch(processor)
    seen = masks_seen(model, monkeypatch)
    gap, shared = batch["attention_mask"].clone(), torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    gap[0, 0] = 0  # padding before tokens, which would see it
    whole = shared[:, None, None, :] & torch.ones(shared.shape[1], shared.shape[1], dtype=torch.bool).tril()
    for mask in (gap, whole):
        objective(**{**batch, "attention_mask": mask})
    with unclipped.sparse_prefill(model, "full", fallback="never", key_block=4, query_block=8):
        objective(**batch)
    model.set_attn_implementation("eager")
    objective(**batch)
    assert all(mask is not None for mask in seen)
    assert len(seen) == 4


@pytest.mark.parametrize("is_paused", [True, False], ids=["dense step", "fallback"])
def test_dense_under_a_pattern_needs_no_mask_either(
    is_paused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, _ = tiny_vlm(tmp_path)
    objective, batch = AnswerObjective(model), padded_batch(processor)
    expected = gradients(objective, batch)
    masks: list[Tensor | None] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    gap = batch["attention_mask"].clone()
    gap[0, 0] = 0
    with unclipped.sparse_prefill(model, "window(4)", calibration="fixed") as sparse:
        sparse.pause(is_paused)
        found = gradients(objective, batch)
        text = len(model.model.language_model.layers)
        assert [mask is None for mask in masks[-text:]] == [True] * text
        objective(**{**batch, "attention_mask": gap})
        assert [mask is None for mask in masks[-text:]] == [False] * text
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
