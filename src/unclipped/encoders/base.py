"""The one interface of every vision encoder, and the table of families."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from unclipped.attention.detect import check_replaceable, key_heads_of
from unclipped.attention.encoder import ARGUMENT as VIEW
from unclipped.attention.encoder import NAME as ENCODER_ATTENTION
from unclipped.attention.encoder import EncoderPattern
from unclipped.attention.encoder import register as register_encoder_attention
from unclipped.attention.patterns import Pattern
from unclipped.core.errors import DataError, UsageError
from unclipped.core.registry import Registry
from unclipped.encoders.grouping import Grid, ImageGrids, encode_in_groups, frames_of
from unclipped.encoders.spec import EncoderSpec, Objective, objective_of
from unclipped.encoders.tiling import parse_tile, tiled

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


# What a model says of its attention, and of its placing on devices and in data types. A model around it reads these
# off its children.
TRAITS = (
    "_supports_sdpa",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
)


class VisionEncoder(nn.Module):
    """A transformers vision model behind the packed-patches contract.

    `forward(pixel_values (sum_patches, channels·ph·pw), image_grid_thw (images, 3)) -> (sum_patches, hidden)`:
    patch order kept, prefix tokens removed, images batched only with images of equal shape, no padding.

    `feature_layers=None` returns the last layer after the family's final norm. A list of indices returns
    those hidden states concatenated along the features, before the final norm: 0 is the embedding output, i the
    output of block i, negative numbers count from the end.

    Grids may also be Python integers, ((t, h, w), …): `torch.compile(fullgraph=True)` and `torch.export` need them so.
    """

    family: ClassVar[str]
    objective: ClassVar[Objective]
    default_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    default_std: ClassVar[tuple[float, ...]] = IMAGENET_STD
    # Regular expressions of checkpoint tensors that this family leaves behind on purpose.
    dropped: ClassVar[tuple[str, ...]] = ()
    build_arguments: ClassVar[dict[str, Any]] = {}
    takes_patterns: ClassVar[bool] = True
    """Whether the model hands the arguments of its call on to its attention functions."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        feature_layers: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        for name in TRAITS:
            setattr(self, name, getattr(model, name, None))
        self.pattern: EncoderPattern | None = None
        self.tile: Grid | None = None
        config: Any = model.config
        self.feature_layers = resolve_layers(feature_layers, self.depth(config))
        width = self.width(config)
        channels = int(config.num_channels)
        self._spec = EncoderSpec(
            family=self.family,
            patch_size=pair(config.patch_size),
            hidden_size=width * (len(self.feature_layers) if self.feature_layers is not None else 1),
            num_prefix_tokens=self.num_prefix_tokens(config),
            image_size=self.native_image_size(config),
            mean=fit_channels(mean or self.default_mean, channels),
            std=fit_channels(std or self.default_std, channels),
            objective=objective_of(config, self.objective),
            licence=licence,
            channels=channels,
        )

    @property
    def config(self) -> Any:
        """The configuration of the model inside."""
        return self.model.config

    @property
    def spec(self) -> EncoderSpec:
        return self._spec

    def set_pattern(self, pattern: str | Pattern | None, *, key_block: int = 128, query_block: int = 256) -> None:
        """Attend under a pattern of `unclipped.attention` from now on, for example `window2d(4, 4) + grid(8)`; None:
        densely. Class and register tokens see and are seen by all patches. Forwards on chosen patches stay dense.

        Raises UsageError for text that is no pattern, and for a model whose attention cannot be replaced.
        """
        if pattern is None:
            self.pattern = None  # without a view the layers attend densely
            return
        if not self.takes_patterns:
            raise UsageError(f"{self.family}: its layers hand no pattern on to their attention; leave the pattern out")
        check_replaceable(self.model)
        register_encoder_attention()
        config: Any = getattr(self.model.config, "text_config", self.model.config)  # of an encoder made from an LM
        self.pattern = EncoderPattern(
            pattern,
            prefix=self.spec.num_prefix_tokens,
            layers=self.depth(self.model.config),
            key_heads=key_heads_of(config),
            key_block=key_block,
            query_block=query_block,
        )

    def set_tile(self, tile: Sequence[int] | int | None) -> None:
        """Encode images in tiles of (rows, columns) patches from now on, each by itself: a page far larger than the
        images of pretraining is seen at their size. None: whole images. A pattern then holds within a tile. Forwards
        on chosen patches (pretraining) stay whole. Raises UsageError for sides below 1.
        """
        self.tile = parse_tile(tile)

    def attention_arguments(self, grids: Sequence[Grid]) -> dict[str, Any]:
        """What `run` hands to the model beside the patches of a batch of these grids: the view of the pattern."""
        if self.pattern is None:
            return {}
        if self.model.config._attn_implementation != ENCODER_ATTENTION:  # fresh, or set for the model as a whole
            self.model.set_attn_implementation(ENCODER_ATTENTION)
        same = grids[:1] if len(set(grids)) == 1 else grids
        return {VIEW: self.pattern.view(same)}

    @classmethod
    def adapt_config(cls, config: Any) -> None:
        """Set, in place, what feature extraction asks of a configuration: no masking, no pooling head."""

    @classmethod
    def build_model(cls, config: Any) -> PreTrainedModel:
        """A freshly initialised model of the family, in torch's default data type."""
        return AutoModel.from_config(config, dtype=torch.get_default_dtype(), **cls.build_arguments)

    @classmethod
    def prepare(cls, model: PreTrainedModel) -> PreTrainedModel:
        """Adapt a built or loaded model: nothing stays trainable that no output uses."""
        return model

    @classmethod
    def depth(cls, config: Any) -> int:
        return int(config.num_hidden_layers)

    @classmethod
    def width(cls, config: Any) -> int:
        return int(config.hidden_size)

    @classmethod
    def num_prefix_tokens(cls, config: Any) -> int:
        return 0

    @classmethod
    def native_image_size(cls, config: Any) -> tuple[int, int] | None:
        return pair(config.image_size)

    def group_key(self, grid: Grid) -> Hashable:
        """Images with equal keys may share a batch; by default those of equal grid."""
        return grid

    def run(self, patches: Tensor, grids: list[Grid], output_hidden_states: bool) -> Any:
        """Call the model on (B, n, channels·ph·pw); returns an output with `last_hidden_state` and `hidden_states`."""
        raise NotImplementedError

    def run_chosen(self, patches: Tensor, keep: Tensor, grid: Grid) -> Tensor:
        """Last layer's states (B, prefix + k, hidden), after the final norm, of the chosen patches of images of one
        grid: they get the positions that they have in the whole image, and see each other and the prefix tokens only.

        patches (B, k, channels·ph·pw): the chosen ones; keep (B, k): their places, row-major. Raises UsageError for a
        family that has no such route.
        """
        raise UsageError(f"{self.family}: it cannot run on chosen patches only")

    def forward(
        self, pixel_values: Tensor, image_grid_thw: ImageGrids, output_hidden_states: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Features (sum_patches, hidden); with `output_hidden_states` also the depth + 1 hidden states, each
        (sum_patches, width): the embedding output, then that of each block, prefix tokens removed.

        Raises DataError when patches and grids do not fit each other.
        """
        if not output_hidden_states:
            return self._packed(pixel_values, image_grid_thw, self._encode)
        states, width = self.depth(self.model.config) + 1, self.width(self.model.config)
        sizes = [self.spec.hidden_size, *[width] * states]
        joined = self._packed(pixel_values, image_grid_thw, self._encode_with_states, sum(sizes))
        features, *hidden = joined.split(sizes, dim=-1)
        return features, tuple(hidden)

    def _packed(
        self,
        pixel_values: Tensor,
        image_grid_thw: ImageGrids,
        encode: Callable[[Tensor, list[Grid]], Tensor],
        width: int | None = None,
    ) -> Tensor:
        """`encode` over all images: (sum_patches, width), by default the width of the features."""
        if pixel_values.ndim != 2 or pixel_values.shape[1] != self.spec.patch_values:
            raise DataError(
                f"pixel_values: expected (patches, {self.spec.patch_values}) for {self.spec.channels} channels and "
                f"patches of {self.spec.patch_size[0]}×{self.spec.patch_size[1]} pixels, "
                f"found {tuple(pixel_values.shape)}; prepare images with this encoder's patch size"
            )
        frames = frames_of(image_grid_thw, pixel_values.shape[0])
        dtype = self.model.dtype
        if not frames:
            return pixel_values.new_zeros((0, width or self.spec.hidden_size), dtype=dtype)
        pixel_values = pixel_values.to(dtype)
        if self.tile is None:
            return encode_in_groups(pixel_values, frames, self.group_key, encode)
        order, back, tiles = tiled(tuple(frames), self.tile)
        pixel_values = pixel_values[order.to(pixel_values.device)]  # patches tile by tile
        features = encode_in_groups(pixel_values, tiles, self.group_key, encode)
        return features[back.to(features.device)]  # (sum_patches, hidden), row-major again

    def _encode(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        return self._features(self.run(patches, grids, self.feature_layers is not None))

    def _encode_with_states(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        output = self.run(patches, grids, True)
        states = [state[:, self.spec.num_prefix_tokens :] for state in output.hidden_states]
        return torch.cat([self._features(output), *states], dim=-1)  # (B, n, hidden + (depth + 1) · width)

    def _features(self, output: Any) -> Tensor:
        """The features among a model's outputs: (B, n, hidden)."""
        if self.feature_layers is None:
            features = output.last_hidden_state
        else:
            features = torch.cat([output.hidden_states[index] for index in self.feature_layers], dim=-1)
        return features[:, self.spec.num_prefix_tokens :]


ENCODERS: Registry[type[VisionEncoder]] = Registry("encoder")


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a number or of a sequence of two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def fit_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value a channel; equal or averaged statistics serve a single-channel encoder."""
    values = tuple(float(value) for value in values)
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if channels == 1:
        return (sum(values) / len(values),)
    raise UsageError(f"mean/std: expected {channels} values, one a channel, found {len(values)}")


def resolve_layers(feature_layers: Sequence[int] | None, depth: int) -> tuple[int, ...] | None:
    """Indices into the depth + 1 hidden states, all non-negative. Raises UsageError when one is out of range."""
    if feature_layers is None:
        return None
    if not feature_layers:
        raise UsageError("feature_layers: expected at least one layer index, or none at all for the last layer")
    for index in feature_layers:
        if not -(depth + 1) <= index <= depth:
            raise UsageError(
                f"feature_layers: {index} is out of range; the encoder has {depth} blocks, so expected "
                f"0 (embeddings) … {depth}, or {-(depth + 1)} … -1 counted from the end"
            )
    return tuple(index % (depth + 1) for index in feature_layers)
