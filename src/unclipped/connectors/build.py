"""The connector module: packed features of mixed grids in, packed tokens of the language model's width out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unclipped.connectors.config import ConnectorConfig
from unclipped.core.errors import UsageError
from unclipped.encoders.grouping import ImageGrids, grid_rows


class Connector(nn.Module):
    """Grid steps, optional standardisation, projection.

    forward: features (sum of patches, vision_hidden) and grids (num_images, 3) -> tokens (sum of tokens, text_hidden)
    and the grids of the tokens (num_images, 3). Images of equal grid go through the steps together. Grids are a tensor,
    or Python integers where a graph is compiled or exported.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ConnectorConfig, vision_hidden: int, text_hidden: int) -> None:
        super().__init__()
        self.config = config
        self.vision_hidden = vision_hidden
        self.text_hidden = text_hidden
        *widths, in_features = config.widths(vision_hidden)
        self._steps = [step.build(width) for step, width in zip(config.before, widths, strict=True)]
        learned = [step for step in self._steps if isinstance(step, nn.Module)]
        if learned:
            self.steps = nn.ModuleList(learned)
        if config.standardise:
            # Identity until measured; saved with the weights, since the projection means nothing without them.
            self.register_buffer("mean", torch.zeros(in_features))
            self.register_buffer("std", torch.ones(in_features))
        self.projection = config.projection.build(in_features, text_hidden)

    def num_tokens(self, image_grid_thw: ImageGrids) -> Tensor:
        """Tokens of each image, int64 (num_images,), on the CPU."""
        return torch.tensor(self.config.num_tokens(grid_rows(image_grid_thw)), dtype=torch.int64)

    def forward(self, features: Tensor, image_grid_thw: ImageGrids) -> tuple[Tensor, Tensor]:
        """See the class. Raises UsageError when features and grids disagree or a grid is not divisible."""
        grids = grid_rows(image_grid_thw)
        device = image_grid_thw.device if isinstance(image_grid_thw, Tensor) else features.device
        out_grids = torch.tensor(self.config.out_grid(grids), dtype=torch.int64, device=device)
        merged = self.merge(features, grids)
        if self.config.standardise:
            merged = (merged - self.mean) / self.std
        return self.projection(merged.to(next(self.projection.parameters()).dtype)), out_grids.reshape(-1, 3)

    def merge(self, features: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """The grid steps alone: (sum of patches, vision_hidden) -> (sum of tokens, in_features)."""
        lengths = [t * h * w for t, h, w in grids]
        if sum(lengths) != features.shape[0] or features.shape[-1] != self.vision_hidden:
            raise UsageError(
                f"connector: expected {sum(lengths)} features of width {self.vision_hidden} for grids {list(grids)}, "
                f"found {features.shape[0]} of width {features.shape[-1]}"
            )
        if not self.config.before:
            return features
        images = features.split(lengths)
        merged: list[Tensor | None] = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            indices = [i for i, other in enumerate(grids) if other == grid]
            frames, rows, columns = grid
            block = torch.stack([images[i] for i in indices])  # (n, t*h*w, c)
            block = block.reshape(len(indices) * frames, rows, columns, -1)  # frames are merged one by one
            for step in self._steps:
                block = step(block)
            block = block.reshape(len(indices), -1, block.shape[-1])  # (n, tokens, in_features)
            for i, image in zip(indices, block, strict=True):
                merged[i] = image
        return torch.cat([image for image in merged if image is not None])

    @torch.no_grad()
    def set_standardisation(self, mean: Tensor, std: Tensor) -> None:
        """Take the measured mean and standard deviation of each feature, (in_features,) each.

        Raises UsageError when this connector does not standardise, or a deviation is not positive.
        """
        if not self.config.standardise:
            raise UsageError(
                f"connector '{self.config}' does not standardise; write 'standardise' before the projection"
            )
        if not bool((std > 0).all()):
            raise UsageError("connector: a feature has zero standard deviation on the data that was measured")
        self.mean.copy_(mean)
        self.std.copy_(std)

    @torch.no_grad()
    def measure(self, features: Tensor, image_grid_thw: ImageGrids) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per projection input over these features, (in_features,) each, in fp32.

        A feature that never changes gets a deviation of 1: it is centred and left alone.
        """
        merged = self.merge(features, grid_rows(image_grid_thw)).float()
        std = merged.std(dim=0, correction=0)
        return merged.mean(dim=0), torch.where(std > 1e-6, std, torch.ones_like(std))

    @torch.no_grad()
    def start_from_embeddings(self, embeddings: Tensor) -> None:
        """Start the last layer inside the token embeddings (vocabulary, text_hidden) of the language model.

        Weights N(0, embedding std / sqrt(inputs)), bias the mean embedding: with inputs of unit variance the first
        visual tokens have the mean and the spread of text tokens.
        """
        last = self.config.projection.last_layer(self.projection)
        scale = embeddings.float().std().item() / last.in_features**0.5
        nn.init.normal_(last.weight, std=scale)
        last.bias.copy_(embeddings.float().mean(dim=0))


def build_connector(config: ConnectorConfig, vision_hidden: int, text_hidden: int) -> Connector:
    """A connector with fresh weights for an encoder of `vision_hidden` and a language model of `text_hidden`."""
    return Connector(config, vision_hidden, text_hidden)
