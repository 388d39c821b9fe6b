"""A vision encoder from images with captions: the examples, and the job that comparing and captioning share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from unclipped.core.errors import UsageError
from unclipped.data.config import DataConfig
from unclipped.data.mixture import Mixture
from unclipped.data.pairs import pair_of
from unclipped.data.sample import ImagePart
from unclipped.encoders.spec import declare_objective
from unclipped.images.config import ImageRule
from unclipped.images.prepare import normalised, pixels
from unclipped.objectives.base import Objective
from unclipped.objectives.caption_tokens import CaptionTokens
from unclipped.objectives.side_files import fill_side
from unclipped.objectives.text_side import PAIR_OBJECTIVES, TEXT_SIDE, save_text_side
from unclipped.objectives.trunk import Trunk, save_trunk
from unclipped.training.batches import Examples
from unclipped.training.config import PretrainConfig, StageConfig
from unclipped.training.continued import goes_on, heads_notes, text_side
from unclipped.training.device import world
from unclipped.training.fresh_trunk import MEASURED_IMAGES, declared_objective, fresh_trunk, image_rule
from unclipped.training.resolution import Resolution
from unclipped.training.stages import Job
from unclipped.training.tokenizer import train_tokenizer

MakeModel = Callable[[PretrainConfig, Trunk, Any], tuple[nn.Module, Objective]]
"""(configuration, trunk with fresh weights, tokenizer) → the model, trunk included, and the objective over it."""
SaveText = Callable[[Path, nn.Module, Any, ImageRule], None]
"""(folder of the encoder, trained model, tokenizer, rule of the images): write what stands beside the encoder."""
MakeExamples = Callable[["PairExamples"], Examples]
"""Pairs → the examples that the objective takes, for what it adds to a batch."""


class PairExamples:
    """Example i is the pair of draw i: its image stretched to a square, its caption in tokens.

    Images change from epoch to epoch by what `data.augment` says.
    """

    def __init__(self, mixture: Mixture, rule: ImageRule, captions: CaptionTokens) -> None:
        """`rule`: side, mean and standard deviation of the images."""
        assert rule.size is not None
        self.mixture, self.rule, self.captions = mixture, rule, captions
        self.num_patches = (rule.size[0] // rule.patch_size[0]) * (rule.size[1] // rule.patch_size[1])

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`pixel_values` (B, C, S, S), normalised; `input_ids` and `attention_mask` int64 (B, T); `sample_ids`."""
        pairs = [self.mixture.first_good(index, self._pair) for index in indices]
        planes = torch.from_numpy(np.stack([image for _, image, _ in pairs])).permute(0, 3, 1, 2)  # (B, C, S, S)
        ids, mask = self.captions.batch([row for _, _, row in pairs])
        return {
            "pixel_values": normalised(planes, self.rule),
            "input_ids": ids,
            "attention_mask": mask,
            "sample_ids": [name for name, _, _ in pairs],
        }

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Patches and estimated tokens of text."""
        return [self.mixture.lengths(index, lambda height, width: self.num_patches) for index in indices]

    def _pair(self, item: Any) -> tuple[str, np.ndarray, list[int]]:
        """(sample id, uint8 (S, S, C), token ids)."""
        part, caption = pair_of(item)
        row = self.captions.row(caption, f"sample {item.id}")
        return item.id, pixels(part, self.rule), row


def pair_job(
    config: PretrainConfig,
    make_model_and_objective: MakeModel,
    *,
    declared: Literal["contrastive", "sigmoid", "captioning"],
    side_name: str,
    save_text: SaveText | None = None,
    make_examples: MakeExamples | None = None,
) -> Job:
    """Train the tokenizer on the captions, measure the pixels, build the trunk and describe the training.

    `declared`: what the saved encoder says of its training; `contrastive` and `sigmoid` make it a baseline.
    `side_name`: the folder beside the encoder that holds the text side. The model
    folder is the trunk and what `save_text` adds; batches are those of `PairExamples` or what `make_examples` makes of
    them. `config.pairs` says how long a caption may be. Raises UsageError for shapes that do not fit and data that are
    not read pair by pair, DataError for samples that are no pairs.
    """
    data = config.data
    if data.share_image or data.blind is not None:
        name = "share_image" if data.share_image else "blind"
        raise UsageError(f"data.{name}: {config.objective} learns from single images with their captions; leave it out")
    torch.manual_seed(config.training.seed)
    trunk, side = fresh_trunk(config)
    plain = Mixture(_unaugmented(data), config.training.seed)
    continued = text_side(config, side_name) if goes_on(config) else None
    if continued is None:
        captions_to_learn = (caption for _, caption in _pairs(plain, config.tokenizer.documents))
        tokenizer = train_tokenizer(config.tokenizer, captions_to_learn)
    else:
        tokenizer = continued.tokenizer
    captions = CaptionTokens(tokenizer, config.pairs.context_length, config.pairs.long_captions)
    rule = image_rule(config, trunk, side, (image for image, _ in _pairs(plain, MEASURED_IMAGES)))
    model, objective = make_model_and_objective(config, trunk, tokenizer)
    if continued is not None:
        fill_side(model, continued.tensors, continued.folder)
    declare_objective(trunk.encoder.model.config, declared_objective(trunk, declared))
    resolution = Resolution(config, rule, (trunk,))
    resolution.notes += heads_notes(config, side_name)

    def make_objective(stage: StageConfig, carried: dict[str, Any]) -> Objective:
        resolution.enter(stage)
        return objective

    def save(folder: Path) -> None:
        save_trunk(trunk, folder, resolution.rule)
        if save_text is not None:
            save_text(folder, model, tokenizer, resolution.rule)

    def examples(stage: StageConfig) -> Examples:
        pairs = PairExamples(Mixture(data, config.training.seed), resolution.rule_of(stage), captions)
        return resolution.later(stage, pairs if make_examples is None else make_examples(pairs))

    return Job(
        model=model,
        make_objective=make_objective,
        make_examples=examples,
        save=save,
        fit=resolution.enter,
        notes=resolution.notes,
    )


def comparison_job(config: PretrainConfig) -> Job:
    """The job of an objective that compares images with captions: contrastive, sigmoid or coca.

    Raises UsageError for a batch without a second pair to compare with, and as `pair_job`.
    """
    compared = min(stage.batch_size // stage.gradient_accumulation for stage in config.stages())
    if compared < 2:
        raise UsageError(
            f"batch_size: {config.objective} compares at least two pairs of a micro-batch (over all "
            f"{world()[1]} processes), found {compared}; raise batch_size or lower gradient_accumulation"
        )
    kind = PAIR_OBJECTIVES[config.objective]

    def make(config: PretrainConfig, trunk: Trunk, tokenizer: Any) -> tuple[nn.Module, Objective]:
        objective = kind.build(trunk, tokenizer, config.pairs)
        return objective.model, objective

    def save_text(folder: Path, model: nn.Module, tokenizer: Any, rule: ImageRule) -> None:
        save_text_side(folder, model, tokenizer, rule, objective=config.objective, pairs=config.pairs)

    return pair_job(config, make, declared=kind.declared, side_name=TEXT_SIDE, save_text=save_text)


def _unaugmented(data: DataConfig) -> DataConfig:
    """The same draws without augmentation, which captions and pixel statistics do not need."""
    sources = tuple(source.model_copy(update={"augment": None}) for source in data.sources)
    return data.model_copy(update={"augment": None, "sources": sources})


def _pairs(mixture: Mixture, most: int) -> Iterator[tuple[ImagePart, str]]:
    """Image and caption of one pass over a finite mixture, and in any case of no more than `most` draws."""
    for index in range(most if mixture.length is None else min(mixture.length, most)):
        yield mixture.first_good(index, _pair)


def _pair(item: Any) -> tuple[ImagePart, str]:
    return pair_of(item)
