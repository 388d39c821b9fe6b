"""The text side of an encoder trained on pairs, saved beside it: captions and images in one space."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.images.config import ImageRule
from unclipped.objectives.caption_tokens import CaptionTokens
from unclipped.objectives.coca import CoCaObjective
from unclipped.objectives.contrastive import ContrastiveObjective
from unclipped.objectives.pairs import PairModel, PairObjective
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.side_files import fill_side, read_side, save_side
from unclipped.objectives.sigmoid import SigmoidObjective
from unclipped.objectives.trunk import Trunk

TEXT_SIDE = "text_side"

PAIR_OBJECTIVES: dict[str, type[PairObjective]] = cast(  # to a type checker a registered class is any objective
    "dict[str, type[PairObjective]]",
    {"contrastive": ContrastiveObjective, "sigmoid": SigmoidObjective, "coca": CoCaObjective},
)
"""The objectives that compare images with captions, by the name they are registered under."""


class TextSide:
    """Captions and images as unit vectors of one space, for retrieval and for naming what an image shows.

    The cosine of an image and a text is a product of two rows; `logit_scale` times it, plus `logit_bias` where there is
    one, is what the softmax over texts (contrastive, coca) or the sigmoid of one pair (sigmoid) takes.
    """

    def __init__(self, model: PairModel, captions: CaptionTokens, rule: ImageRule, objective: str) -> None:
        self.model, self.captions, self.rule, self.objective = model.eval(), captions, rule, objective

    @property
    def logit_scale(self) -> float:
        """Factor on cosines."""
        return float(self.model.log_scale.detach().exp())

    @property
    def logit_bias(self) -> float | None:
        """Added to scaled cosines; None where the objective has none."""
        return None if self.model.bias is None else float(self.model.bias.detach())

    @property
    def device(self) -> torch.device:
        """Where the weights are; results stay there."""
        return self.model.log_scale.device

    def to(self, device: torch.device | str) -> TextSide:
        """Move the weights."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode_text(self, texts: list[str], *, batch_size: int = 256) -> Tensor:
        """(n, embedding size), unit length. Raises DataError for an empty text, or one that is too long and not cut."""
        rows = [self.captions.row(text, f"text {number}") for number, text in enumerate(texts)]
        batches = [self.captions.batch(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        features = [self.model.embed_text(ids.to(self.device), mask.to(self.device)) for ids, mask in batches]
        return torch.cat(features) if features else self._none()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W), prepared by `rule` → (n, embedding size), unit length."""
        return self.model.embed_images(pixels.to(self.device)) if len(pixels) else self._none()

    def _none(self) -> Tensor:
        projection: Any = self.model.get_submodule("text_projection")
        return torch.zeros(0, projection.out_features, device=self.device)


def save_text_side(
    folder: Path, model: nn.Module, tokenizer: Any, rule: ImageRule, *, objective: str, pairs: PairsConfig
) -> None:
    """Write `folder/text_side`: everything of `model` but its trunk, which `folder` itself holds, and the tokenizer."""
    fields = {"objective": objective, "pairs": pairs.model_dump(mode="json"), "rule": rule.model_dump(mode="json")}
    save_side(folder / TEXT_SIDE, model, tokenizer, fields)


def load_text_side(folder: str | Path, *, random_seed: int | None = None) -> TextSide:
    """The text side of an encoder folder that pretraining on pairs wrote, with its encoder.

    random_seed: fresh weights on both sides drawn from it, beside the folder's own tokenizer.
    Raises CheckpointError when the folder has none, or when its files do not fit each other.
    """
    side = Path(folder) / TEXT_SIDE

    def parse(fields: dict[str, Any]) -> tuple[type[PairObjective], str, PairsConfig, ImageRule]:
        kind = PAIR_OBJECTIVES[fields["objective"]]
        return kind, fields["objective"], PairsConfig(**fields["pairs"]), ImageRule(**fields["rule"])

    (kind, objective, pairs, rule), tensors, tokenizer = read_side(
        side, parse, what="a text side", objectives=", ".join(PAIR_OBJECTIVES)
    )
    encoder, _ = load_encoder(str(folder), baseline=True)
    captions = CaptionTokens(tokenizer, pairs.context_length, pairs.long_captions)
    if random_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            shape, spec = copy.deepcopy(encoder.model.config), encoder.spec
            fresh = Trunk(build_encoder(shape, baseline=True, mean=spec.mean, std=spec.std))
            return TextSide(kind.build(fresh, tokenizer, pairs).model, captions, rule, objective)
    model: PairModel = kind.build(Trunk(encoder), tokenizer, pairs).model
    fill_side(model, tensors, side)
    return TextSide(model, captions, rule, objective)
