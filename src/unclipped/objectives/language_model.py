"""Next-token prediction on plain text: every token after the first is predicted."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unclipped.objectives.base import OBJECTIVES, Batch, Counts, Objective, normaliser


@OBJECTIVES.register("language_model")
class LanguageModelObjective(Objective):
    """Cross-entropy of a decoder on token blocks; labels of −100 are left out."""

    needs = "text"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def count(self, batch: Batch) -> Counts:
        return {"tokens": (batch["labels"][:, 1:] != -100).sum()}

    def part_of(self, name: str) -> Literal["vision", "connector", "text"]:
        return "text"

    def num_tokens(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

    def forward(
        self,
        *,
        counts: Counts | None = None,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """`input_ids`, `labels`: int64 (batch, length)."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        targets = labels[:, 1:].reshape(-1)  # (batch · (length − 1),)
        predictions = logits[:, :-1].reshape(-1, logits.shape[-1]).float()  # (batch · (length − 1), vocabulary)
        own = {"tokens": (targets != -100).sum()}
        total = F.cross_entropy(predictions, targets, ignore_index=-100, reduction="sum")
        loss = total / normaliser(counts, own, "tokens")
        return {"loss": loss, "parts": {"next_token": loss.detach()}}
