"""A small vision encoder from images alone, by masked autoencoding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
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
from unclipped.images.prepare import normalised, pixels
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
"""Most that prepared images may take in memory."""


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


class PreparedImages:
    """Prepared images of a mixture by its places, in memory of a fixed size that is taken when it is made.

    Only images that come again are worth keeping: those of finite sources, when a stage goes through them more than
    once. Where not all have room, the first units of the sources are kept, since every epoch brings each once.
    """

    def __init__(self, mixture: Mixture, shape: tuple[int, int, int], *, draws: int, at_once: bool) -> None:
        """`shape`: (side, side, channels) of an image. `draws`: how many are taken. `at_once`: touch all memory now,
        so that the process does not grow step by step; else the system gives it as images come."""
        lengths = [unit.length or 0 for unit in mixture.units]
        self.first_rows = [0, *accumulate(lengths)]
        # Of a mixture with an endless source the finite ones get a share of the draws; then keeping is worth a try.
        rows = self.first_rows[-1] if draws > self.first_rows[-1] else 0
        rows = min(rows, _CACHE_BYTES // int(np.prod(shape)))
        self.pixels = np.zeros((rows, *shape), dtype=np.uint8)  # (rows, side, side, channels)
        if at_once:
            self.pixels.fill(0)
        self.held = np.full(rows, -1, dtype=np.int32)  # (rows,): which image of its sample a row holds

    def row(self, place: tuple[int, int]) -> int | None:
        """Where the image at a place of the mixture is kept; None when it has no room."""
        source, unit = place
        row = self.first_rows[source] + unit
        return row if row < min(len(self.held), self.first_rows[source + 1]) else None

    def get(self, place: tuple[int, int], which: int) -> np.ndarray | None:
        """Image `which` of the sample at a place, when it is there."""
        row = self.row(place)
        return self.pixels[row] if row is not None and self.held[row] == which else None

    def put(self, place: tuple[int, int], which: int, pixels: np.ndarray) -> None:
        """Keep an image, when it has room; of each sample the newest."""
        if (row := self.row(place)) is not None:
            self.pixels[row], self.held[row] = pixels, which


class ImageExamples:
    """Example i is an image of draw i, stretched to a square; window, flip and mask are functions of the seed and i."""

    def __init__(
        self,
        mixture: Mixture,
        rule: ImageRule,
        config: PretrainConfig,
        *,
        batch_size: int,
        steps: int,
        smallest_window: int | None,
        first: int = 0,
    ) -> None:
        """`rule`: the stretch, and the mean and standard deviation. `batch_size`: images of a step, all of which have
        one window of `smallest_window` px or more. `steps`: of the stage. `first`: the first draw of its first step."""
        assert rule.size is not None
        self.mixture, self.rule, self.first = mixture, rule, first
        self.side, self.seed = rule.size[0], config.training.seed
        self.num_patches = (self.side // rule.patch_size[0]) * (self.side // rule.patch_size[1])
        self.batch_size, self.flip, self.objective = batch_size, config.flip, config.objective
        self.smallest_window = smallest_window or self.side
        if self.smallest_window > self.side:
            raise UsageError(f"smallest_window: {smallest_window} is larger than the image side of {self.side} px")
        is_fixed = mixture.config.augment is None and all(s.augment is None for s in mixture.config.sources)
        self.draws = batch_size * steps if is_fixed else 0
        self._at_once = config.training.workers == 0  # each worker has a memory of its own, and fills a part of it
        self._prepared: PreparedImages | None = None

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`pixel_values` (batch, channels, side, side), `noise` (batch, patches), `sample_ids`."""
        loaded = [self.mixture.first_good(index, lambda item, i=index: self._image(item, i)) for index in indices]
        planes = torch.from_numpy(np.stack([image for _, image in loaded])).permute(0, 3, 1, 2)  # (B, C, side, side)
        generators = [np.random.default_rng([self.seed, index, 11]) for index in indices]
        noise = np.stack([g.random(self.num_patches, dtype=np.float32) for g in generators])  # (B, patches)
        if self.flip:
            mirrored = torch.tensor([bool(g.random() < 0.5) for g in generators])
            planes = torch.where(mirrored[:, None, None, None], planes.flip(-1), planes)
        step = self.first + (indices[0] - self.first) // self.batch_size  # a number that no other stage has
        return {
            "pixel_values": normalised(self._window(planes.float() / 255, step), self.rule),
            "noise": torch.from_numpy(noise),
            "sample_ids": [name for name, _ in loaded],
        }

    @property
    def prepared(self) -> PreparedImages:
        """Images kept by this process."""
        if self._prepared is None:
            shape = (self.side, self.side, self.rule.channels)
            self._prepared = PreparedImages(self.mixture, shape, draws=self.draws, at_once=self._at_once)
        return self._prepared

    def _window(self, planes: Tensor, step: int) -> Tensor:
        """One random square window for the whole batch, stretched back to the full side."""
        if self.smallest_window == self.side:
            return planes
        generator = np.random.default_rng([self.seed, step, 12])
        side = int(generator.integers(self.smallest_window, self.side + 1))
        top, left = (int(v) for v in generator.integers(0, self.side - side + 1, size=2))
        window = planes[:, :, top : top + side, left : left + side]  # (B, C, window, window)
        if side == self.side:
            return window
        return F.interpolate(window, size=(self.side, self.side), mode="bilinear", align_corners=False)

    def _image(self, item: Any, index: int) -> tuple[str, np.ndarray]:
        """(sample id, uint8 (side, side, channels)) of one of the sample's images."""
        parts: tuple[ImagePart, ...] = tuple(item.images)
        if not parts:
            raise DataError(f"sample {item.id}: has no image, which {self.objective} needs")
        which = int(np.random.default_rng([self.seed, index, 13]).integers(len(parts)))
        place = self.mixture.place(index)
        if (kept := self.prepared.get(place, which)) is not None:
            return item.id, kept
        image = pixels(parts[which], self.rule)
        self.prepared.put(place, which, image)
        return item.id, image

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """All images are equally large."""
        return [self.num_patches] * len(indices)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}


def image_examples(mixture: Mixture, resolution: Resolution, config: PretrainConfig, stage: StageConfig) -> Examples:
    """The images of a stage, which go on where those of the stage before ended; the window grows with the side."""
    smallest = config.smallest_window and resolution.scaled(stage, config.smallest_window)
    first, rule = resolution.first_draw(stage), resolution.rule_of(stage)
    examples = ImageExamples(
        mixture,
        rule,
        config,
        batch_size=stage.batch_size,
        steps=stage.steps,
        smallest_window=smallest,
        first=first,
    )
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
