"""What every pretraining of an encoder begins with: its weights, the side of its images, and their statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from unclipped.core.errors import CheckpointError, UsageError, nearest
from unclipped.data.mixture import Mixture
from unclipped.data.sample import ImagePart
from unclipped.data.sources import expanded
from unclipped.data.statistics import statistics_of_images
from unclipped.encoders.build import LLM_OPTIONS, load_encoder
from unclipped.encoders.given_config import check_fields
from unclipped.encoders.llm_config import LLMVisionConfig
from unclipped.encoders.source import LLM_PREFIX
from unclipped.encoders.spec import BASELINE_OBJECTIVES, Objective
from unclipped.images.config import ImageRule
from unclipped.objectives.text_side import PAIR_OBJECTIVES
from unclipped.objectives.trunk import FAMILIES, Trunk, build_trunk
from unclipped.training.config import PretrainConfig

DEFAULT_SIDE = 96
"""Side in pixels of the images where neither recipe nor shape names one."""
REGULARISERS = ("attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob")
"""Fields of `shape` that may stand beside `init`: what is dropped while training."""
MEASURED_IMAGES = 512
"""Images whose mean and deviation stand for all."""


def fresh_trunk(config: PretrainConfig, *, maskable: bool = False) -> tuple[Trunk, int]:
    """The trunk of `config.shape`, or of `config.init` with its weights, and the side of its images in pixels, to which
    the positions of the latter are still to be brought (see `Resolution`).

    Raises UsageError as `build_trunk`, and for a side that patches do not fill; with `init` what `load_encoder` raises,
    UsageError for a shape beside it and for families that are not trained here.
    """
    if config.init is not None:
        trunk = Trunk(_loaded(config, config.init).train(), maskable=maskable)
        return trunk, _filled(trunk, config.image_size or side_of(trunk, None))
    has_table = config.shape.get("model_type") != "unclipped_llm_encoder"
    trunk = build_trunk(config.shape, image_size=config.image_size if has_table else None, maskable=maskable)
    return trunk, side_of(trunk, config.image_size)


def _loaded(config: PretrainConfig, init: str) -> Any:
    """The encoder that training starts from."""
    is_llm = init.startswith(LLM_PREFIX)
    allowed = LLM_OPTIONS if is_llm else REGULARISERS
    for name in config.shape:
        if name not in allowed:
            raise UsageError(
                f"shape.{name}: the encoder under init has its shape already; leave this field out (shape={{}} on the "
                f"command line), or init; {nearest(name, allowed)}"
            )
    if is_llm:
        check_fields(LLMVisionConfig(), config.shape, "shape")
    for name, value in config.shape.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in REGULARISERS and not (is_number and 0 <= value < 1):
            raise UsageError(f"shape.{name}: expected a number from 0 to 1 (excluded), found {value!r:.60}")
    folder = expanded(init.removeprefix(LLM_PREFIX), "init")
    options: dict[str, Any] = {"patch_size": 12} | config.shape if is_llm else {"changes": config.shape}
    is_allowed = config.baseline or config.objective in PAIR_OBJECTIVES
    try:
        encoder, _ = load_encoder(LLM_PREFIX * is_llm + folder, baseline=is_allowed, **options)
    except (UsageError, CheckpointError) as error:
        here = " (here: `baseline: true` beside init)" if "baseline" in str(error) else ""
        raise type(error)(f"init: {error}{here}") from error
    families = (*FAMILIES, "vit_mae")
    if encoder.family not in families:
        raise UsageError(f"init: {folder} holds a {encoder.family}, which is not trained here; valid: {families}")
    return encoder


def declared_objective(trunk: Trunk, own: Objective) -> Objective:
    """What an encoder trained by `own` declares: what comes from a baseline stays one."""
    start = trunk.encoder.spec.objective
    return start if start in BASELINE_OBJECTIVES and own not in BASELINE_OBJECTIVES else own


def side_of(trunk: Trunk, image_size: int | None) -> int:
    """Side in pixels of the images that a trunk is trained on: that of its position table, else `image_size`, else 96.

    Raises UsageError for a side that patches do not fill.
    """
    native = trunk.encoder.spec.image_size
    return _filled(trunk, native[0] if native is not None else image_size or DEFAULT_SIDE)


def _filled(trunk: Trunk, side: int) -> int:
    """`side`, when whole patches fill it."""
    if any(side % patch for patch in trunk.patch_size):
        raise UsageError(
            f"image_size: {side} px are no multiple of the patch of {trunk.patch_size[0]}×{trunk.patch_size[1]} px"
        )
    return side


def first_images(mixture: Mixture) -> Iterator[ImagePart]:
    """The images of the first draws, as many draws as are measured."""
    return (part for index in range(MEASURED_IMAGES) for part in mixture.read(index).images)


def image_rule(config: PretrainConfig, trunk: Trunk, side: int, images: Iterable[ImagePart]) -> ImageRule:
    """Stretch to side × side px, normalised by the mean and deviation that an encoder under `init` states, else by
    those of `images`, which are then read."""
    channels: Any = trunk.channels
    rule = ImageRule(rule="squash", size=(side, side), patch_size=trunk.patch_size, channels=channels)
    if config.init is not None and not config.init.startswith(LLM_PREFIX):  # a new stem has no statistics to keep to
        mean, std = trunk.encoder.spec.mean, trunk.encoder.spec.std
    else:
        mean, std = statistics_of_images(images, rule)
    return rule.model_copy(update={"mean": mean, "std": std})
