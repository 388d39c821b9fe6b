"""A vision encoder from images with captions, by writing the captions: which are predicted all at once, and the job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unclipped.images.config import ImageRule
from unclipped.objectives.base import Objective
from unclipped.objectives.caption_side import CAPTION_DECODER, save_caption_decoder
from unclipped.objectives.captioning import Captioner, CaptioningObjective
from unclipped.objectives.trunk import Trunk
from unclipped.training.config import PretrainConfig
from unclipped.training.pair_pretraining import PairExamples, pair_job
from unclipped.training.stages import Job

_STREAM = 0x0CA9
"""Sets these draws apart from others that take the seed and the number of a draw."""


class CaptioningExamples:
    """Pairs, and for each whether its caption is predicted all at once: a function of the seed and the draw alone."""

    def __init__(self, pairs: PairExamples, *, parallel_share: float, seed: int) -> None:
        self.pairs, self.parallel_share, self.seed = pairs, parallel_share, seed
        self.rule = pairs.rule

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """As `PairExamples`, and `parallel` bool (B,)."""
        draws = [np.random.default_rng([self.seed, _STREAM, index]).random() for index in indices]
        return self.pairs.batch(indices) | {"parallel": torch.tensor(draws) < self.parallel_share}

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Patches and estimated tokens of text."""
        return self.pairs.lengths(indices)


def captioning_job(config: PretrainConfig) -> Job:
    """The job of an encoder that learns from captions. Raises as `pair_job`."""

    def make(config: PretrainConfig, trunk: Trunk, tokenizer: Any) -> tuple[nn.Module, Objective]:
        length, start = config.pairs.context_length, int(tokenizer.eos_token_id)
        model = Captioner(trunk, len(tokenizer), config.captioning, context_length=length, start=start)
        return model, CaptioningObjective(model)

    def examples(pairs: PairExamples) -> CaptioningExamples:
        return CaptioningExamples(pairs, parallel_share=config.captioning.parallel_share, seed=config.training.seed)

    def save_text(folder: Path, model: Any, tokenizer: Any, rule: ImageRule) -> None:
        save_caption_decoder(folder, model, tokenizer, rule, captioning=config.captioning, pairs=config.pairs)

    return pair_job(
        config, make, declared="captioning", side_name=CAPTION_DECODER, save_text=save_text, make_examples=examples
    )
