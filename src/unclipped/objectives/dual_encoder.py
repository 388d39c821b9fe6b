"""Two towers, one for images and one for captions, that meet in one space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unclipped.objectives.pair_losses import unit
from unclipped.objectives.pairs import PairModel
from unclipped.objectives.pairs_config import PairsConfig
from unclipped.objectives.text_tower import TextTower, initialise
from unclipped.objectives.trunk import Trunk


class DualEncoder(PairModel):
    """A trunk's pooled feature and a text tower's, each projected without bias and brought to unit length."""

    def __init__(
        self, trunk: Trunk, vocabulary_size: int, config: PairsConfig, *, log_scale: float, bias: float | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.text = TextTower(vocabulary_size, config, pooling=config.text_pooling)
        self.image_projection = nn.Linear(trunk.width, config.embedding_size, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embedding_size, bias=False)
        initialise(self.image_projection)
        initialise(self.text_projection)
        self.log_scale = nn.Parameter(torch.tensor([log_scale]))
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def embed_images(self, pixels: Tensor) -> Tensor:
        return unit(self.image_projection(self.trunk(pixels).pooled))

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return unit(self.text_projection(self.text(input_ids, attention_mask).pooled))
