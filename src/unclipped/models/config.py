"""The `model:` section of a recipe. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from unclipped.connectors.config import parse_connector
from unclipped.core.config import (
    FrozenConfig,
    PathText,
    PatternText,
    Seed,
    Whole,
)
from unclipped.core.errors import UsageError
from unclipped.encoders.source import VisionSource, parse_vision
from unclipped.images.config import BROADCAST, ImageRule

LayerNumber = Annotated[Whole, Field(ge=-1024, le=1024)]
TileSide = Annotated[Whole, Field(ge=1, le=4096)]


def _optional(name: str) -> tuple[Any, Any]:
    """A field of `ImageRule` that may be left out; pairs and channels also take one number, as the rule does."""
    field = ImageRule.model_fields[name]
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation  # with ranges
    if name in BROADCAST:
        several = next(part for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is tuple)
        kind = kind | get_args(several)[0]
    return kind | None, Field(default=None, description=field.description)


_fields: dict[str, Any] = {name: _optional(name) for name in ImageRule.model_fields if name != "patch_size"}
_OptionalRule: Any = create_model("_OptionalRule", __base__=FrozenConfig, **_fields)


class ImageSettings(_OptionalRule):
    """Changes of the image rule that the encoder suggests; a field left out keeps the suggestion.

    Its fields are those of `ImageRule`, but for the patch, which belongs to the encoder.
    """

    def given(self) -> dict[str, Any]:
        """The fields that were set."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


_BESIDE_CHECKPOINT = frozenset({"checkpoint", "image", "dtype", "seed"})


class ModelConfig(FrozenConfig):
    """What the model is made of: an encoder, a language model and a connector, or an assembled folder."""

    vision: VisionSource | None = None
    """Folder or hub id of a vision encoder; `llm:ID`, or `{llm: ID, patch_size, rope, rope_theta, stem, layers}`, for
    one made from a language model; or a configuration with its `model_type`, for one trained from scratch."""
    text: PathText | None = None
    """Folder or hub id of the decoder language model."""
    connector: Annotated[str, Field(max_length=1000)] = "mlp(2)"
    """Grid steps and projection, for example `pixel_shuffle(2x2) + mlp(2)`."""
    connector_init: Literal["default", "embedding"] = "default"
    """`embedding` starts the connector's last layer inside the token embeddings."""
    checkpoint: PathText | None = None
    """Folder of an assembled model to start from, instead of `vision` and `text`."""
    baseline: bool = False
    """Must be true for an encoder that was trained contrastively: it is a baseline here."""
    feature_layers: Annotated[tuple[LayerNumber, ...], Field(max_length=1024)] | None = None
    """Hidden states of the encoder to concatenate (0 is the embedding, negative numbers count from the end); by default
    the last layer after its norm."""
    vision_attention: PatternText | None = None
    """Pattern of the encoder's attention, for example `window2d(8, 8) + grid(8)`; class and register tokens see all. It
    belongs to the model and is saved with it; by default the encoder is dense."""
    vision_tile: tuple[TileSide, TileSide] | TileSide | None = None
    """(rows, columns) of patches of a tile: large images are encoded tile by tile, each by itself, at the size that the
    encoder was pretrained with. It belongs to the model and is saved with it; by default images are encoded whole."""
    random_vision: bool = False
    """Keep the encoder's shape but start it from random weights: the random-encoder baseline."""
    image: ImageSettings = ImageSettings()
    """Changes of the image rule that the encoder suggests."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the assembled weights; `auto` is the language model's own."""
    seed: Seed = 0
    """Seed of the new weights (patch embedding, connector, random encoder)."""

    @field_validator("connector")
    @classmethod
    def _readable_connector(cls, value: str) -> str:
        try:
            return str(parse_connector(value))
        except UsageError as error:
            raise ValueError(str(error)) from None

    @model_serializer(mode="wrap")
    def _as_given(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A record must read back: beside a checkpoint the fields that cannot stand there are left out."""
        fields = plain(self)
        return {name: fields[name] for name in fields if self.checkpoint is None or name in _BESIDE_CHECKPOINT}

    @field_validator("vision", mode="before")
    @classmethod
    def _text_is_a_value(cls, value: Any) -> Any:
        return parse_vision(value)

    @field_validator("vision")
    @classmethod
    def _inline_names_its_type(cls, value: Any) -> Any:
        if isinstance(value, dict) and "model_type" not in value:
            raise ValueError("an inline vision configuration needs 'model_type', for example 'vit' or 'dinov2'")
        return value

    @model_validator(mode="after")
    def _one_way_to_start(self) -> ModelConfig:
        if self.checkpoint is not None:
            parts = self.model_fields_set - _BESIDE_CHECKPOINT
            if parts:
                raise ValueError(
                    f"checkpoint is a whole model, so {', '.join(sorted(parts))} cannot be set beside it; leave one out"
                )
            if set(self.image.given()) & {"channels", "merge"}:
                raise ValueError("image.channels and image.merge belong to the checkpoint's encoder and connector")
        elif self.vision is None or self.text is None:
            raise ValueError("give both vision and text, or checkpoint alone")
        return self
