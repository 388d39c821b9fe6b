"""Two checkpoints in, one model out: an encoder and a language model joined by a fresh connector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import GenerationConfig

from unclipped.connectors.config import ConnectorConfig, parse_connector
from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.base import VisionEncoder
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.given_config import config_from_fields
from unclipped.encoders.llm_encoder import register_llm_encoder
from unclipped.encoders.tiling import parse_tile
from unclipped.images.config import ImageRule
from unclipped.models.checkpoint import load_model
from unclipped.models.config import ModelConfig
from unclipped.models.configuration import UnclippedConfig
from unclipped.models.freezing import parameter_table
from unclipped.models.image_processing import UnclippedImageProcessor
from unclipped.models.language import (
    end_of_turn_ids,
    fit_vocabulary,
    load_language_model,
    load_tokenizer,
    prepare_tokenizer,
    probe_logits,
)
from unclipped.models.modeling import UnclippedForConditionalGeneration, UnclippedModel
from unclipped.models.processing import UnclippedProcessor

LLM_PREFIX = "llm:"
# Distance between the logits of the language model alone and inside, beyond which assembly is refused.
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AssemblyReport:
    """What was joined and decided."""

    vision: str
    objective: str
    vision_weights: str
    """Which tensors the encoder took, or that it starts from random weights."""
    text: str
    connector: str
    image_rule: dict[str, Any]
    image_token: str
    tokens_added: int
    """Rows added to the vocabulary."""
    pad_token: str
    chat_template: str
    parameters: list[dict[str, Any]]
    licence: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A few lines for people."""
        rule = self.image_rule
        size = f"{rule['size'][0]}x{rule['size'][1]} px" if rule["size"] else f"up to {rule['max_tokens']} tokens"
        total = self.parameters[-1]["total"]
        parts = ", ".join(f"{row['part']} {row['total']:,}" for row in self.parameters[:-1])
        return [
            f"vision     {self.vision} ({self.objective}): {self.vision_weights}",
            f"connector  {self.connector}",
            f"text       {self.text}",
            f"images     {rule['rule']}, {size}, patches {rule['patch_size'][0]}x{rule['patch_size'][1]} px",
            f"tokens     image {self.image_token}, padding {self.pad_token}, {self.tokens_added} added; "
            f"chat template: {self.chat_template}",
            f"parameters {total:,} ({parts})",
        ]


def assemble(
    vision: str | dict[str, Any],
    text: str,
    connector: str | ConnectorConfig = "mlp(2)",
    *,
    image: dict[str, Any] | None = None,
    baseline: bool = False,
    feature_layers: Sequence[int] | None = None,
    vision_attention: str | None = None,
    vision_tile: Sequence[int] | int | None = None,
    patch_size: int | tuple[int, int] | None = None,
    rope: str = "axial",
    rope_theta: float | None = None,
    stem: str = "linear",
    random_vision: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> tuple[UnclippedForConditionalGeneration, UnclippedProcessor, AssemblyReport]:
    """Join an encoder and a language model: -> (model in evaluation mode, processor, report).

    vision: folder, hub id, `llm:` and either of them, or a configuration with its model_type (random weights). text:
    folder or hub id. connector: text form. image: fields of the image rule that differ from the encoder's suggestion.
    vision_attention: pattern of the encoder's attention, dense without. vision_tile: (rows, columns) of patches of the
    tiles in which it encodes images, whole without. patch_size, rope, rope_theta and stem shape an
    encoder made from a language model. `seed` alone determines the new weights. Raises UsageError and CheckpointError,
    see the parts.
    """
    parsed = parse_connector(connector)
    settings = {key: value for key, value in (image or {}).items() if value is not None}
    llm_options = _llm_options(vision, patch_size, rope, rope_theta, stem, settings)
    with torch.random.fork_rng():
        lm, text_folder = load_language_model(text, dtype)
        torch.manual_seed(seed)  # again before each new part: the start of one never depends on the others
        vision_tower, weights, licence = _vision_tower(
            vision, feature_layers, baseline, lm.dtype, random_vision, llm_options
        )
        vocabulary = lm.get_input_embeddings().weight.shape[0]
        expected = probe_logits(lm, vocabulary)
        tokenizer = load_tokenizer(text_folder)
        if tokenizer.vocab_size > vocabulary:  # a few added tokens may lack rows: they get them below
            raise CheckpointError(
                f"{text}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary is {vocabulary}; "
                "they do not belong together"
            )
        notes = prepare_tokenizer(tokenizer, text)
        torch.manual_seed(seed)
        added = fit_vocabulary(lm, tokenizer)
        rule = image_rule(vision_tower, parsed, settings)
        processor = UnclippedProcessor(
            UnclippedImageProcessor(rule), tokenizer, connector=parsed, image_token=notes.image_token
        )
        torch.manual_seed(seed)
        model = _join(
            lm, vision_tower, parsed, processor.image_token_id, baseline, feature_layers, vision_attention, vision_tile
        )
    _set_generation(model, lm, tokenizer)
    distance = (probe_logits(model, vocabulary) - expected).abs().max().item()
    if not distance <= LOGIT_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CheckpointError(
            f"{text}: without images the assembled model's logits differ from the language model's own by "
            f"{distance:.3g}; '{lm.config.model_type}' changes embeddings or logits in a way that cannot be taken over"
        )
    report = AssemblyReport(
        vision=vision if isinstance(vision, str) else str(vision["model_type"]),
        objective="none" if random_vision or isinstance(vision, dict) else vision_tower.spec.objective,
        vision_weights=weights,
        text=text,
        connector=str(parsed),
        image_rule=rule.model_dump(mode="json"),
        image_token=notes.image_token,
        tokens_added=added,
        pad_token=notes.pad_token,
        chat_template=notes.template,
        parameters=parameter_table(model),
        licence=licence,
    )
    return model.eval(), processor, report


def assemble_from_config(
    config: ModelConfig, seed: int | None = None
) -> tuple[UnclippedForConditionalGeneration, UnclippedProcessor, AssemblyReport]:
    """Assemble, or load, what a recipe's `model:` section says; `seed` replaces the section's own."""
    if config.checkpoint is not None:
        return _from_checkpoint(config)
    assert config.vision is not None  # the section's own validation
    assert config.text is not None
    return assemble(
        config.vision,
        config.text,
        parse_connector(config.connector, init=config.connector_init),
        image=config.image.given(),
        baseline=config.baseline,
        feature_layers=config.feature_layers,
        vision_attention=config.vision_attention,
        vision_tile=config.vision_tile,
        patch_size=config.patch_size,
        rope=config.rope,
        rope_theta=config.rope_theta,
        stem=config.stem,
        random_vision=config.random_vision,
        dtype=config.dtype,
        seed=config.seed if seed is None else seed,
    )


def set_pixel_statistics(processor: UnclippedProcessor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Normalise pixels with these statistics (one number a channel, on values in 0..1) from now on, saved or not."""
    rule = processor.image_processor.image_rule
    processor.image_processor.image_rule = _rule(
        {**rule.model_dump(exclude_unset=True), "mean": tuple(mean), "std": tuple(std)}
    )


def image_rule(encoder: VisionEncoder, connector: ConnectorConfig, settings: dict[str, Any]) -> ImageRule:
    """The image rule that suits an encoder and a connector, with the user's `settings` on top.

    Encoders of one size get every image squashed to it; the others keep size and aspect under a token budget. Raises
    UsageError when the settings do not fit.
    """
    spec = encoder.spec
    if "patch_size" in settings:
        raise UsageError("image.patch_size: the encoder decides it; set the model's patch_size")
    if settings.get("channels", spec.channels) != spec.channels:
        raise UsageError(f"image.channels: the encoder takes {spec.channels}, found {settings['channels']}")
    fields: dict[str, Any] = {
        "patch_size": spec.patch_size,
        "merge": connector.merge,
        "channels": spec.channels,
        "mean": spec.mean,
        "std": spec.std,
    }
    if spec.image_size is not None and "rule" not in settings and "fixed_height" not in settings:
        fields["rule"] = "squash"
        fields["size"] = spec.image_size
    elif settings.get("rule", "native") != "native" and spec.image_size is not None:
        fields["size"] = spec.image_size
    rule = _rule({**fields, **settings})
    rows, columns = connector.merge
    if rule.merge[0] % rows or rule.merge[1] % columns:
        raise UsageError(
            f"image.merge {rule.merge}: the connector '{connector}' needs multiples of {rows}x{columns}; leave it out"
        )
    return rule


def _rule(fields: dict[str, Any]) -> ImageRule:
    try:
        return ImageRule(**fields)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        raise UsageError(f"image{'.' + where if where else ''}: {message}") from None


def _llm_options(
    vision: str | dict[str, Any],
    patch_size: int | tuple[int, int] | None,
    rope: str,
    rope_theta: float | None,
    stem: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Options of an encoder made from a language model. Raises UsageError when they are given for another encoder."""
    options: dict[str, Any] = {}
    if patch_size is not None:
        options["patch_size"] = patch_size
    if rope != "axial":
        options["rope_form"] = rope
    if rope_theta is not None:
        options["rope_theta"] = rope_theta
    if stem != "linear":
        options["stem"] = stem
    if isinstance(vision, str) and vision.startswith(LLM_PREFIX):
        if "channels" in settings:
            options["num_channels"] = settings["channels"]
        return options
    if options:
        raise UsageError(
            f"model.{next(iter(options)).replace('rope_form', 'rope')}: only for an encoder made from a language model "
            "(vision: llm:…); another encoder brings its own"
        )
    return {}


def _vision_tower(
    vision: str | dict[str, Any],
    feature_layers: Sequence[int] | None,
    baseline: bool,
    dtype: torch.dtype,
    random_vision: bool,
    llm_options: dict[str, Any],
) -> tuple[VisionEncoder, str, str | None]:
    """The encoder, a line about its weights, and its licence."""
    if isinstance(vision, dict):
        register_llm_encoder()
        fields = dict(vision)
        config = config_from_fields(fields.pop("model_type"), fields, "model.vision")
        encoder = build_encoder(config, feature_layers=feature_layers, baseline=baseline)
        return encoder.to(dtype), "random weights, from its configuration", None
    encoder, loaded = load_encoder(vision, feature_layers=feature_layers, baseline=baseline, dtype=dtype, **llm_options)
    spec = encoder.spec
    if random_vision:
        encoder = build_encoder(
            encoder.model.config, feature_layers=feature_layers, baseline=baseline, mean=spec.mean, std=spec.std
        ).to(dtype)
        return encoder, "random weights, in the shape of the checkpoint", spec.licence
    return encoder, loaded.summary(), spec.licence


def _join(
    lm: Any,
    vision_tower: VisionEncoder,
    connector: ConnectorConfig,
    image_token_id: int,
    baseline: bool,
    feature_layers: Sequence[int] | None,
    vision_attention: str | None,
    vision_tile: Sequence[int] | int | None,
) -> UnclippedForConditionalGeneration:
    """One model of the loaded parts and a fresh connector."""
    lm_head: nn.Linear = lm.get_output_embeddings()
    config = UnclippedConfig(
        vision_config=vision_tower.model.config,
        text_config=lm.config,
        connector_config=connector,
        image_token_id=image_token_id,
        vision_feature_layers=list(feature_layers) if feature_layers is not None else None,
        vision_attention=vision_attention,
        vision_tile=list(tile) if (tile := parse_tile(vision_tile)) is not None else None,
        baseline=baseline,
        lm_head_bias=lm_head.bias is not None,
        tie_word_embeddings=lm_head.weight is lm.get_input_embeddings().weight,
    )
    config.dtype = lm.dtype
    inner = UnclippedModel(config, vision_tower=vision_tower, language_model=lm.base_model)
    inner.connector.to(lm.dtype)
    model = UnclippedForConditionalGeneration(config, model=inner, lm_head=lm_head)
    if connector.init == "embedding":
        ids = torch.arange(lm_head.weight.shape[0], device=lm_head.weight.device)
        with torch.no_grad():  # through the layer, which may scale (Gemma)
            inner.connector.start_from_embeddings(lm.get_input_embeddings()(ids))
    return model


def _set_generation(model: UnclippedForConditionalGeneration, lm: Any, tokenizer: Any) -> None:
    """The language model's own generation settings, with padding, ends of turn, and no image token ever."""
    settings = GenerationConfig.from_dict(lm.generation_config.to_dict())
    own = settings.eos_token_id
    ids = [own] if isinstance(own, int) else list(own or [])
    ids += [token for token in end_of_turn_ids(tokenizer) if token not in ids]
    settings.eos_token_id = ids[0] if len(ids) == 1 else ids
    settings.pad_token_id = tokenizer.pad_token_id
    settings.suppress_tokens = [model.config.image_token_id]
    model.generation_config = settings


def _from_checkpoint(
    config: ModelConfig,
) -> tuple[UnclippedForConditionalGeneration, UnclippedProcessor, AssemblyReport]:
    """An assembled folder as a recipe's start, with the image settings changed where the recipe says so."""
    assert config.checkpoint is not None
    model, processor = load_model(config.checkpoint, dtype=config.dtype)
    changes = config.image.given()
    if changes:
        rule = processor.image_processor.image_rule
        processor.image_processor.image_rule = _rule({**rule.model_dump(exclude_unset=True), **changes})
    rule = processor.image_processor.image_rule
    report = AssemblyReport(
        vision=config.checkpoint,
        objective=model.model.vision_tower.spec.objective,
        vision_weights="from the checkpoint",
        text=config.checkpoint,
        connector=str(model.config.connector),
        image_rule=rule.model_dump(mode="json"),
        image_token=processor.image_token,
        tokens_added=0,
        pad_token=processor.tokenizer.pad_token,
        chat_template="from the checkpoint",
        parameters=parameter_table(model),
    )
    return model, processor, report
