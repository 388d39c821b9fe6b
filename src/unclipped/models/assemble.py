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
from unclipped.encoders.source import LanguageModelSource
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
    config: ModelConfig, *, seed: int | None = None
) -> tuple[UnclippedForConditionalGeneration, UnclippedProcessor, AssemblyReport]:
    """Join an encoder and a language model, or load an assembled folder: -> (model in eval mode, processor, report).

    `seed`, or the configuration's own, alone determines the new weights. Raises UsageError and CheckpointError, see the
    parts.
    """
    if config.checkpoint is not None:
        return _from_checkpoint(config)
    assert config.vision is not None  # the section's own validation
    assert config.text is not None
    seed = config.seed if seed is None else seed
    parsed = parse_connector(config.connector, init=config.connector_init)
    settings = config.image.given()
    with torch.random.fork_rng():
        lm, text_folder = load_language_model(config.text, config.dtype)
        torch.manual_seed(seed)  # again before each new part: the start of one never depends on the others
        vision_tower, weights, licence = _vision_tower(config, lm.dtype, settings)
        vocabulary = lm.get_input_embeddings().weight.shape[0]
        expected = probe_logits(lm, vocabulary)
        tokenizer = load_tokenizer(text_folder)
        if tokenizer.vocab_size > vocabulary:  # a few added tokens may lack rows: they get them below
            raise CheckpointError(
                f"{config.text}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary is "
                f"{vocabulary}; they do not belong together"
            )
        notes = prepare_tokenizer(tokenizer, config.text)
        torch.manual_seed(seed)
        added = fit_vocabulary(lm, tokenizer)
        rule = image_rule(vision_tower, parsed, settings)
        processor = UnclippedProcessor(
            UnclippedImageProcessor(rule), tokenizer, connector=parsed, image_token=notes.image_token
        )
        torch.manual_seed(seed)
        model = _join(config, lm, vision_tower, parsed, processor.image_token_id)
    _set_generation(model, lm, tokenizer)
    distance = (probe_logits(model, vocabulary) - expected).abs().max().item()
    if not distance <= LOGIT_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CheckpointError(
            f"{config.text}: without images the assembled model's logits differ from the language model's own by "
            f"{distance:.3g}; '{lm.config.model_type}' changes embeddings or logits in a way that cannot be taken over"
        )
    shape = config.vision if isinstance(config.vision, dict) else None
    report = AssemblyReport(
        vision=str(config.vision if shape is None else shape["model_type"]),
        objective="none" if config.random_vision or shape is not None else vision_tower.spec.objective,
        vision_weights=weights,
        text=config.text,
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


def _vision_tower(
    model: ModelConfig, dtype: torch.dtype, settings: dict[str, Any]
) -> tuple[VisionEncoder, str, str | None]:
    """The encoder, a line about its weights, and its licence."""
    source = model.vision
    layers, baseline = model.feature_layers, model.baseline
    if isinstance(source, dict):
        register_llm_encoder()
        fields = dict(source)
        config = config_from_fields(fields.pop("model_type"), fields, "model.vision")
        encoder = build_encoder(config, feature_layers=layers, baseline=baseline)
        return encoder.to(dtype), "random weights, from its configuration", None
    options: dict[str, Any] = {}
    if isinstance(source, LanguageModelSource):
        options = source.options()
        if "channels" in settings:
            options["num_channels"] = settings["channels"]
    encoder, loaded = load_encoder(str(source), feature_layers=layers, baseline=baseline, dtype=dtype, **options)
    spec = encoder.spec
    if model.random_vision:
        encoder = build_encoder(
            encoder.model.config, feature_layers=layers, baseline=baseline, mean=spec.mean, std=spec.std
        ).to(dtype)
        return encoder, "random weights, in the shape of the checkpoint", spec.licence
    return encoder, loaded.summary(), spec.licence


def _join(
    model: ModelConfig, lm: Any, vision_tower: VisionEncoder, connector: ConnectorConfig, image_token_id: int
) -> UnclippedForConditionalGeneration:
    """One model of the loaded parts and a fresh connector."""
    lm_head: nn.Linear = lm.get_output_embeddings()
    config = UnclippedConfig(
        vision_config=vision_tower.model.config,
        text_config=lm.config,
        connector_config=connector,
        image_token_id=image_token_id,
        vision_feature_layers=list(model.feature_layers) if model.feature_layers is not None else None,
        vision_attention=model.vision_attention,
        vision_tile=list(tile) if (tile := parse_tile(model.vision_tile)) is not None else None,
        baseline=model.baseline,
        lm_head_bias=lm_head.bias is not None,
        tie_word_embeddings=lm_head.weight is lm.get_input_embeddings().weight,
    )
    config.dtype = lm.dtype
    inner = UnclippedModel(config, vision_tower=vision_tower, language_model=lm.base_model)
    inner.connector.to(lm.dtype)
    joined = UnclippedForConditionalGeneration(config, model=inner, lm_head=lm_head)
    if connector.init == "embedding":
        ids = torch.arange(lm_head.weight.shape[0], device=lm_head.weight.device)
        with torch.no_grad():  # through the layer, which may scale (Gemma)
            inner.connector.start_from_embeddings(lm.get_input_embeddings()(ids))
    return joined


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
