"""A small vision encoder from images alone, by masked autoencoding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTMAEConfig

from unclipped.core.errors import DataError, UsageError
from unclipped.data.mixture import Mixture
from unclipped.data.sample import ImagePart
from unclipped.encoders.build import build_encoder
from unclipped.encoders.given_config import check_fields, config_from_fields
from unclipped.encoders.hf import keep_as_buffer
from unclipped.encoders.spec import declare_objective
from unclipped.encoders.vit_mae_init import fill_table
from unclipped.images.config import ImageRule
from unclipped.images.decode import load_image
from unclipped.images.rules import apply_rule
from unclipped.objectives.autoencoder_folder import decoder_options
from unclipped.objectives.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderObjective
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.objectives.trunk import Trunk, build_trunk, save_trunk
from unclipped.training.batches import Examples
from unclipped.training.config import PretrainConfig, StageConfig
from unclipped.training.continued import autoencoder, goes_on, heads_notes
from unclipped.training.fresh_trunk import declared_objective, first_images, fresh_trunk, image_rule, side_of
from unclipped.training.resolution import Resolution
from unclipped.training.stages import Job

_SMALL = {
    "image_size": 96,
    "patch_size": 12,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 192,
    "norm_pix_loss": True,
}
_CACHE_BYTES = 1 << 29


def build_autoencoder(
    shape: dict[str, Any], image_size: int | None = None, config: MaskedAutoencoderConfig | None = None
) -> MaskedAutoencoder:
    """A masked autoencoder with fresh weights, positions included.

    `shape`: `model_type` `vit_mae` (the default: small) with fields of ViTMAEConfig, which name the decoder too; or a
    shape of `build_trunk`, whose decoder is that of `config`. An encoder with a position table has it fixed at sines
    and cosines. Raises UsageError for another model type, an unknown field, an image side that patches do not fill,
    or a `config` beside a `vit_mae`.
    """
    if "name" in shape or shape.get("model_type", "vit_mae") != "vit_mae":
        is_decoder = shape.get("model_type") == "unclipped_llm_encoder"
        trunk = build_trunk(shape, image_size=None if is_decoder else image_size)
        if not is_decoder:
            model: Any = trunk.encoder.model
            fill_table(model.embeddings.position_embeddings.data)
        return _around(trunk, config)
    if config not in (None, MaskedAutoencoderConfig()):
        raise UsageError(
            "masked_autoencoder: the shape of a vit_mae names mask and decoder itself (mask_ratio, norm_pix_loss, "
            "decoder_…); leave this section out, or train a vit"
        )
    fields = {name: value for name, value in shape.items() if name != "model_type"}
    check_fields(ViTMAEConfig(), fields, "shape")
    merged = _SMALL | fields | ({"image_size": image_size} if image_size is not None else {})
    for name in ("image_size", "patch_size"):
        if not isinstance(merged[name], int):
            raise UsageError(f"shape.{name}: expected one number of pixels (square), found {merged[name]!r}")
    if merged["image_size"] % merged["patch_size"]:
        raise UsageError(
            f"shape: image_size {merged['image_size']} is no multiple of patch_size {merged['patch_size']}"
        )
    given: Any = config_from_fields("vit_mae", merged, "shape")
    options = decoder_options(given)  # before the encoder's mask is switched off
    return MaskedAutoencoder(Trunk(build_encoder(given)), options, eps=given.layer_norm_eps)


def _around(trunk: Trunk, config: MaskedAutoencoderConfig | None) -> MaskedAutoencoder:
    """A fresh decoder for a trunk, whose position table, where it has one, is trained no more."""
    model: Any = trunk.encoder.model
    if trunk.encoder.spec.image_size is not None:
        keep_as_buffer(model, "embeddings.position_embeddings")
    return MaskedAutoencoder(trunk, config or MaskedAutoencoderConfig())


class ImageExamples:
    """Example i is an image of draw i, stretched to a square; window, flip and mask are functions of the seed and i."""

    def __init__(
        self,
        mixture: Mixture,
        rule: ImageRule,
        config: PretrainConfig,
        *,
        batch_size: int,
        smallest_window: int | None,
        first: int = 0,
    ) -> None:
        """`rule`: the stretch, and the mean and standard deviation. `batch_size`: images of a step, all of which have
        one window of `smallest_window` px or more. `first`: the first draw of the first step."""
        assert rule.size is not None
        self.mixture, self.rule, self.first = mixture, rule, first
        self.side, self.seed = rule.size[0], config.training.seed
        self.num_patches = (self.side // rule.patch_size[0]) * (self.side // rule.patch_size[1])
        self.batch_size, self.flip, self.objective = batch_size, config.flip, config.objective
        self.smallest_window = smallest_window or self.side
        if self.smallest_window > self.side:
            raise UsageError(f"smallest_window: {smallest_window} is larger than the image side of {self.side} px")
        is_fixed = mixture.config.augment is None and all(s.augment is None for s in mixture.config.sources)
        self._cache: OrderedDict[tuple[int, ...], np.ndarray] | None = OrderedDict() if is_fixed else None

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`pixel_values` (batch, channels, side, side), `noise` (batch, patches), `sample_ids`."""
        loaded = [self.mixture.first_good(index, lambda item, i=index: self._image(item, i)) for index in indices]
        pixels = torch.from_numpy(np.stack([image for _, image in loaded])).permute(0, 3, 1, 2)  # (B, C, side, side)
        generators = [np.random.default_rng([self.seed, index, 11]) for index in indices]
        noise = np.stack([g.random(self.num_patches, dtype=np.float32) for g in generators])  # (B, patches)
        if self.flip:
            mirrored = torch.tensor([bool(g.random() < 0.5) for g in generators])
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        step = self.first + (indices[0] - self.first) // self.batch_size  # a number that no other stage has
        return {
            "pixel_values": self.normalise(self._window(pixels.float() / 255, step)),
            "noise": torch.from_numpy(noise),
            "sample_ids": [name for name, _ in loaded],
        }

    def normalise(self, pixels: Tensor) -> Tensor:
        """(…, C, H, W) in 0..1 -> the encoder's scale."""
        mean = torch.tensor(self.rule.mean).view(-1, 1, 1)
        std = torch.tensor(self.rule.std).view(-1, 1, 1)
        return (pixels - mean) / std

    def _window(self, pixels: Tensor, step: int) -> Tensor:
        """One random square window for the whole batch, stretched back to the full side."""
        if self.smallest_window == self.side:
            return pixels
        generator = np.random.default_rng([self.seed, step, 12])
        side = int(generator.integers(self.smallest_window, self.side + 1))
        top, left = (int(v) for v in generator.integers(0, self.side - side + 1, size=2))
        window = pixels[:, :, top : top + side, left : left + side]  # (B, C, window, window)
        if side == self.side:
            return window
        return F.interpolate(window, size=(self.side, self.side), mode="bilinear", align_corners=False)

    def _image(self, item: Any, index: int) -> tuple[str, np.ndarray]:
        """(sample id, uint8 (side, side, channels)) of one of the sample's images."""
        parts: tuple[ImagePart, ...] = tuple(item.images)
        if not parts:
            raise DataError(f"sample {item.id}: has no image, which {self.objective} needs")
        which = int(np.random.default_rng([self.seed, index, 13]).integers(len(parts)))
        key = (*self.mixture.place(index), which)
        if self._cache is not None and key in self._cache:
            return item.id, self._cache[key]
        part, rule = parts[which], self.rule
        image = load_image(
            part.source, name=part.label, max_pixels=rule.max_pixels, max_side=rule.max_side, background=rule.background
        )
        pixels = np.asarray(apply_rule(image.convert("L" if rule.channels == 1 else "RGB"), rule))
        pixels = pixels.reshape(self.side, self.side, rule.channels)
        if self._cache is not None:
            self._cache[key] = pixels
            if len(self._cache) * pixels.nbytes > _CACHE_BYTES:
                self._cache.popitem(last=False)
        return item.id, pixels

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """All images are equally large."""
        return [self.num_patches] * len(indices)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict() if self._cache is not None else None}


def image_examples(mixture: Mixture, resolution: Resolution, config: PretrainConfig, stage: StageConfig) -> Examples:
    """The images of a stage, which go on where those of the stage before ended; the window grows with the side."""
    smallest = config.smallest_window and resolution.scaled(stage, config.smallest_window)
    first, rule = resolution.first_draw(stage), resolution.rule_of(stage)
    examples = ImageExamples(mixture, rule, config, batch_size=stage.batch_size, smallest_window=smallest, first=first)
    return resolution.later(stage, examples)


def masked_autoencoder_job(config: PretrainConfig) -> Job:
    """Measure the pixels, build the autoencoder and describe the training. Raises UsageError and DataError."""
    torch.manual_seed(config.training.seed)
    if config.init is not None:
        trunk, side = fresh_trunk(config)
        if goes_on(config):
            model = autoencoder(config)
            model.trunk = trunk  # the same weights, with what the recipe changes
        else:
            model = _around(trunk, config.masked_autoencoder)
    else:
        model = build_autoencoder(config.shape, config.image_size, config.masked_autoencoder)
        trunk, side = model.trunk, side_of(model.trunk, config.image_size)
    mixture = Mixture(config.data, config.training.seed)
    rule = image_rule(config, trunk, side, first_images(mixture))
    model.visible((side // trunk.patch_size[0]) * (side // trunk.patch_size[1]))
    encoder_config: Any = trunk.encoder.model.config
    declared = declared_objective(trunk, "self_supervised")
    declare_objective(encoder_config, declared)  # whatever the family usually stands for
    resolution = Resolution(config, rule, (trunk,))
    resolution.notes += heads_notes(config, None)

    def make_objective(stage: StageConfig, carried: dict[str, Any]) -> MaskedAutoencoderObjective:
        resolution.enter(stage)
        return MaskedAutoencoderObjective(model)

    def save(folder: Path) -> None:
        if encoder_config.model_type != "vit_mae":
            return save_trunk(trunk, folder, resolution.rule)
        encoder_config.mask_ratio = model.options.mask_ratio  # for who goes on training it as a ViTMAE
        try:
            save_trunk(trunk, folder, resolution.rule)
        finally:
            encoder_config.mask_ratio = 0.0  # in the encoder, which sees what it is given

    return Job(
        model=model,
        make_objective=make_objective,
        make_examples=lambda stage: image_examples(mixture, resolution, config, stage),
        save=save,
        fit=resolution.enter,
        notes=resolution.notes,
    )
