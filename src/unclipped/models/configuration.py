"""Configuration of an assembled model: the encoder's, the language model's, and how they are joined."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from unclipped.connectors.config import ConnectorConfig, parse_connector
from unclipped.core.errors import CheckpointError, UsageError


class UnclippedConfig(PreTrainedConfig):
    """`vision_config` and `text_config` are whatever their own `model_type` says; the decoder is never written by us.

    connector_config: fields of `ConnectorConfig`, or its text form.
    image_token_id: the placeholder in `input_ids` that stands for one visual token.
    vision_feature_layers: hidden states of the encoder that are concatenated; None is its last layer.
    vision_attention: pattern of the encoder's attention (`unclipped.attention`), as text; None is dense.
    vision_tile: (rows, columns) of patches of the tiles in which images are encoded; None encodes them whole.
    baseline: True when the encoder was trained contrastively and is used as a declared baseline.
    lm_head_bias: whether the language model's own output layer has a bias.
    """

    model_type = "unclipped"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector_config: ConnectorConfig | dict[str, Any] | str | None = None,
        image_token_id: int = 0,
        vision_feature_layers: list[int] | None = None,
        vision_attention: str | None = None,
        vision_tile: list[int] | None = None,
        baseline: bool = False,
        lm_head_bias: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, "dinov2")
        self.text_config = _sub_config(text_config, "qwen3")
        if isinstance(connector_config, dict):
            connector = ConnectorConfig(**connector_config)
        else:
            connector = parse_connector(connector_config or "mlp")
        self.connector_config = connector.model_dump(mode="json")
        self.image_token_id = image_token_id
        self.vision_feature_layers = None if vision_feature_layers is None else [int(i) for i in vision_feature_layers]
        self.vision_attention = vision_attention
        self.vision_tile = None if vision_tile is None else [int(side) for side in vision_tile]
        self.baseline = baseline
        self.lm_head_bias = lm_head_bias
        self.tie_word_embeddings = tie_word_embeddings
        if kwargs.get("attn_implementation") is None:
            # The base class would clear the choice that parts which are built already run with.
            kwargs["attn_implementation"] = {
                "vision_config": _attention_of(self.vision_config),
                "text_config": _attention_of(self.text_config),
            }
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As usual. Raises CheckpointError for the fields of another model, which would give one of default size."""
        found = config_dict.get("model_type")
        if found != cls.model_type or not config_dict.keys() >= {"vision_config", "text_config"}:
            raise CheckpointError(
                f"configuration: expected an assembled model ('{cls.model_type}' with vision_config and text_config), "
                f"found model_type {found!r}; make one with `unclipped assemble --vision … --text … --output DIR`"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def connector(self) -> ConnectorConfig:
        """The connector as a typed value."""
        return ConnectorConfig(**self.connector_config)


def _sub_config(config: PreTrainedConfig | dict[str, Any] | None, default_type: str) -> PreTrainedConfig:
    """A configuration object from an object, a dictionary that names its `model_type`, or nothing."""
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config or {"model_type": default_type})
    if "model_type" not in fields:
        raise UsageError("configuration: a part has no 'model_type'; copy it from the config.json it came from")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _attention_of(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """The attention implementation of a configuration and of those inside it, in the form that transformers takes."""
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    parts = {name: _attention_of(part) for name, part in inner.items() if isinstance(part, PreTrainedConfig)}
    return {"": config._attn_implementation, **parts} if parts else config._attn_implementation
