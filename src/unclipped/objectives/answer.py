"""The answers of a vision-language model: next-token loss at supervised places, and auxiliary parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import is_available, is_initialized

from unclipped.attention.transformers_interface import stands_behind
from unclipped.models.freezing import part_of
from unclipped.models.modeling import UnclippedForConditionalGeneration
from unclipped.objectives.base import OBJECTIVES, Batch, Counts, Objective, normaliser
from unclipped.objectives.ctc import IGNORED, CTCHead


@OBJECTIVES.register("answer")
class AnswerObjective(Objective):
    """Cross-entropy of the supervised tokens, with logits computed only there, plus weighted auxiliary losses."""

    needs = "pairs"
    model: UnclippedForConditionalGeneration

    def __init__(
        self,
        model: UnclippedForConditionalGeneration,
        *,
        auxiliary: Mapping[str, float] | None = None,
        ctc_head: CTCHead | None = None,
    ) -> None:
        """`auxiliary`: weight of each auxiliary part; `ctc` needs `ctc_head`."""
        super().__init__()
        self.model = model
        self.ctc_weight = (auxiliary or {}).get("ctc", 0.0)
        self.ctc_head = ctc_head if self.ctc_weight else None

    def part_of(self, name: str) -> Any:
        return "vision" if name.startswith("ctc_head.") else part_of(name)

    def num_tokens(self, batch: Batch) -> int:
        mask = batch["attention_mask"]
        # In a 4-D mask a padded query sees itself alone, any other sees the first position.
        return int(mask.sum()) if mask.ndim == 2 else int(mask[:, 0, :, 0].sum())

    def num_samples(self, batch: Batch) -> int:
        return batch["input_ids"].shape[0]

    def count(self, batch: Batch) -> Counts:
        targets = batch["labels"][:, 1:]
        counts = {"tokens": ((targets != IGNORED) & (targets != self.model.config.image_token_id)).sum()}
        if self.ctc_head is not None:
            readings, rows = self._readings(batch)
            self.ctc_head.note(rows, len(readings))
            counts |= {"ctc": torch.tensor(len(readings)), "ctc_rows": torch.tensor(rows)}
        return counts

    def _readings(self, batch: Mapping[str, Any]) -> tuple[list[Any], int]:
        assert self.ctc_head is not None
        grid = batch.get("image_grid_thw")
        tokens: Sequence[int] = [] if grid is None else self.model.model.connector.num_tokens(grid).tolist()
        return self.ctc_head.readings(batch["input_ids"], batch["labels"], batch.get("position_ids"), grid, tokens)

    def forward(self, *, counts: Counts | None = None, **batch: Any) -> dict[str, Any]:
        """`batch`: what the collator makes; `counts` as in `Objective`."""
        own = self.count(batch) if counts is None else {}
        num_tokens = normaliser(counts, own, "tokens")
        pixels, grid = batch.pop("pixel_values", None), batch.get("image_grid_thw")
        images = None
        if pixels is not None:
            images = self.model.get_image_features(pixels, batch["image_grid_thw"])
        idle = self._idle_vision(batch["input_ids"].device) if images is None else None
        readings, rows = self._readings(batch) if self.ctc_head is not None else ([], 0)
        batch.pop("image_grid_thw", None)
        if idle is not None:
            # Through the language model too: where it is frozen, nothing else would send its backward pass along.
            batch["inputs_embeds"] = self.model.get_input_embeddings()(batch.pop("input_ids")) + idle
        if self._is_plainly_causal(batch["attention_mask"]):
            batch["attention_mask"] = None
        output = self.model(
            **batch,
            mm_encoder_outputs={"image": images} if images is not None else None,
            supervised_only=True,
            use_cache=False,
            num_items_in_batch=num_tokens,
        )
        loss = answer = output.loss
        parts = {"answer": answer.detach()}
        if self.ctc_head is not None:
            ctc = torch.zeros_like(answer)
            if images is not None:
                ctc = self.ctc_head(images.last_hidden_state, grid, readings) / normaliser(counts, own, "ctc")
            loss = loss + self.ctc_weight * ctc
            left_out = (rows - len(readings)) / normaliser(counts, own, "ctc_rows")
            parts |= {"ctc": ctc.detach(), "ctc_left_out": left_out.to(answer.device)}
        return {"loss": loss, "parts": parts}

    def _is_plainly_causal(self, mask: Tensor) -> bool:
        """Whether the padding of `mask` (B, T) can be left to causality: it stands behind all tokens, so none sees it.

        With a mask, torch's attention forms all pairs instead of the causal half. Other implementations pack padded
        rows themselves, or, as sparse prefill, need to know the tokens (and do the same where they run dense).
        """
        is_sdpa = self.model.model.language_model.config._attn_implementation == "sdpa"
        return is_sdpa and stands_behind(mask)

    def _idle_vision(self, device: torch.device) -> Tensor | None:
        """Zero, but through the vision tower and the connector, for a micro-batch without images.

        Several processes must run the same collectives in every step, whether their share of the batch has images.
        """
        if not (is_available() and is_initialized()):
            return None
        tower, connector = self.model.model.vision_tower, self.model.model.connector
        height, width = tower.spec.patch_size
        rows, columns = (1, 1)
        if tower.spec.image_size is not None:
            rows, columns = tower.spec.image_size[0] // height, tower.spec.image_size[1] // width
        for step in connector.config.before:
            if tower.spec.image_size is None and step.kind != "resample":
                rows, columns = rows * step.size[0], columns * step.size[1]
        grid = torch.tensor([[1, rows, columns]], device=device)
        pixels = torch.zeros(rows * columns, tower.spec.channels * height * width, device=device)
        images = self.model.get_image_features(pixels, grid)
        assert images.pooler_output is not None
        idle = torch.cat(list(images.pooler_output)).sum() * 0.0
        if self.ctc_head is not None:
            idle = idle + self.ctc_head(images.last_hidden_state, grid, [])
        return idle
