"""The decoder of an encoder trained by captioning, saved beside it: how likely is a caption, given an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclipped.core.errors import UsageError
from unclipped.encoders.build import load_encoder
from unclipped.images.config import ImageRule
from unclipped.objectives.caption_tokens import CaptionTokens
from unclipped.objectives.captioning import Captioner
from unclipped.objectives.captioning_config import CaptioningConfig
from unclipped.objectives.dino_losses import wide
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.side_files import fill_side, read_side, save_side
from unclipped.objectives.trunk import Trunk

CAPTION_DECODER = "caption_decoder"


class CaptionScorer:
    """Log-likelihoods of captions; among names of classes, the likeliest is what the image shows (CapPa)."""

    def __init__(self, model: Captioner, captions: CaptionTokens, rule: ImageRule) -> None:
        self.model, self.captions, self.rule = model.eval(), captions, rule

    @property
    def device(self) -> torch.device:
        """Where the weights are; results stay there."""
        return self.model.mask_token.device

    def to(self, device: torch.device | str) -> CaptionScorer:
        """Move the weights."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def score(self, pixels: Tensor, captions: list[str], *, is_parallel: bool = False) -> Tensor:
        """Σ log p of each caption's tokens, its end included, given each image: (n, m), not divided by length.

        pixels: (n, C, H, W), prepared by `rule`. captions: m texts. is_parallel: all tokens at once from the image
        alone, else each from those before it. Raises UsageError without captions, DataError for an empty caption, or
        one that is too long and not cut.
        """
        if not captions:
            raise UsageError("captions: none to score; give at least one")
        rows = [self.captions.row(caption, f"caption {number}") for number, caption in enumerate(captions)]
        ids, mask = (values.to(self.device) for values in self.captions.batch(rows))  # (m, T)
        modes = torch.full((len(rows),), is_parallel, device=self.device)
        scores = []
        for image in pixels.to(self.device):
            patches = self.model.trunk(image[None]).patches.expand(len(rows), -1, -1)  # (m, patches, D)
            logs = F.log_softmax(wide(self.model.decode(patches, ids, mask, modes)), dim=-1)  # (m, T, V)
            found = logs.gather(2, ids[..., None])[..., 0]  # (m, T)
            scores.append((found * mask).sum(dim=1))
        return torch.stack(scores) if scores else torch.zeros(0, len(rows), device=self.device)


def save_caption_decoder(
    folder: Path, model: Captioner, tokenizer: Any, rule: ImageRule, *, captioning: CaptioningConfig, pairs: PairsConfig
) -> None:
    """Write `folder/caption_decoder`: everything of `model` but its trunk, and the tokenizer."""
    fields = {
        "captioning": captioning.model_dump(mode="json"),
        "pairs": pairs.model_dump(mode="json"),
        "rule": rule.model_dump(mode="json"),
    }
    save_side(folder / CAPTION_DECODER, model, tokenizer, fields)


def load_caption_decoder(folder: str | Path) -> CaptionScorer:
    """The decoder of an encoder folder that pretraining by captioning wrote, with its encoder.

    Raises CheckpointError when the folder has none, or when its files do not fit each other.
    """
    side = Path(folder) / CAPTION_DECODER

    def parse(fields: dict[str, Any]) -> tuple[CaptioningConfig, PairsConfig, ImageRule]:
        return CaptioningConfig(**fields["captioning"]), PairsConfig(**fields["pairs"]), ImageRule(**fields["rule"])

    (captioning, pairs, rule), tensors, tokenizer = read_side(
        side, parse, what="a caption decoder", objectives="captioning"
    )
    encoder, _ = load_encoder(str(folder))
    captions = CaptionTokens(tokenizer, pairs.context_length, pairs.long_captions)
    model = Captioner(
        Trunk(encoder), len(tokenizer), captioning, context_length=pairs.context_length, start=captions.end
    )
    fill_side(model, tensors, side)
    return CaptionScorer(model, captions, rule)
