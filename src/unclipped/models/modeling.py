"""The assembled model: vision tower, connector, and any decoder that transformers builds from `text_config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from unclipped.connectors.build import Connector, build_connector
from unclipped.core.errors import DataError, UsageError
from unclipped.encoders.base import VisionEncoder
from unclipped.encoders.build import build_encoder
from unclipped.encoders.grouping import ImageGrids, grid_rows
from unclipped.models.configuration import UnclippedConfig
from unclipped.models.generation import UnclippedGenerationMixin
from unclipped.models.head import IGNORED, finish_logits, shifted, supervised_positions
from unclipped.models.placing import check_placeholders, place_features, usable_mask


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Encoded images. last_hidden_state: packed patch features (sum of patches, vision_hidden); pooler_output: the
    visual tokens of each image, a list of (tokens, text_hidden); hidden_states, on request: the output of the embedding
    and of each block, (sum of patches, width) each.

    image_grid_thw, the grids of the visual tokens, is there only while the list has one entry an image: transformers
    drops it when it cuts the features for a chunked prefill. The inputs are kept for a draft model with its own tower.
    """

    image_grid_thw: Tensor | None = None
    pixel_values: Tensor | None = None
    patch_grid_thw: Tensor | None = None


@dataclass
class UnclippedModelOutputWithPast(BaseModelOutputWithPast):
    """Decoder outputs and `image_hidden_states`, the visual tokens that were placed, (sum of tokens, text_hidden)."""

    image_hidden_states: Tensor | None = None


@dataclass
class UnclippedCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Loss, logits, cache, and `image_hidden_states` as above."""

    image_hidden_states: Tensor | None = None


class UnclippedPreTrainedModel(PreTrainedModel):
    """What transformers, PEFT, TRL and serving programs read off the class."""

    config_class = UnclippedConfig
    config: UnclippedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Connector"]  # noqa: RUF012 - its statistics and its projection stay on one device
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        """The towers start themselves, so only the connector and the output layer arrive here."""
        if module is getattr(self, "lm_head", None):
            super()._init_weights(module)
        elif isinstance(module, nn.Linear):  # of the connector: as torch starts a linear layer
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, Connector) and module.config.standardise:
            init.zeros_(module.get_buffer("mean"))
            init.ones_(module.get_buffer("std"))


def _keep_weights(*parts: nn.Module | None) -> None:
    """Mark modules that come with their weights, so that `post_init` does not start them afresh."""
    for part in parts:
        for module in part.modules() if part is not None else ():
            module._is_hf_initialized = True  # type: ignore[assignment]


class UnclippedModel(UnclippedPreTrainedModel):
    """Vision tower, connector and language model, without the output layer.

    `vision_tower` and `language_model` take modules that are built already (assembly from two checkpoints).
    """

    def __init__(
        self,
        config: UnclippedConfig,
        vision_tower: VisionEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        _keep_weights(vision_tower, language_model)
        self.vision_tower = vision_tower or build_encoder(
            config.vision_config, feature_layers=config.vision_feature_layers, baseline=config.baseline
        )
        self.vision_tower.set_pattern(config.vision_attention)
        self.vision_tower.set_tile(config.vision_tile)
        self.connector = build_connector(
            config.connector, self.vision_tower.spec.hidden_size, config.text_config.hidden_size
        )
        self.language_model = language_model or AutoModel.from_config(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> UnclippedModel:
        """As usual, but a vision tower with nothing to train stays in evaluation mode: no dropout while frozen."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: ImageGrids,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        """Encode and project images: pixel_values (sum of patches, channels*ph*pw), image_grid_thw (num_images, 3), a
        tensor or Python integers. `return_dict=False` gives a tuple.

        Raises DataError for pixels without grids, UsageError for other arguments and for `output_attentions`: images
        of different sizes have no common shape of attention.
        """
        if image_grid_thw is None:
            raise DataError("pixel_values without image_grid_thw: pass both, as the processor returns them")
        if output_attentions:
            raise UsageError(
                "output_attentions: images of different sizes have no common shape of attention; run "
                "vision_tower.model on images of one size"
            )
        if kwargs:
            raise UsageError(f"get_image_features: no argument '{next(iter(kwargs))}'; leave it out")
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.vision_config.output_hidden_states)
        hidden_states = None
        if output_hidden_states:
            features, hidden_states = self.vision_tower(pixel_values, image_grid_thw, output_hidden_states=True)
        else:
            features = self.vision_tower(pixel_values, image_grid_thw)  # (sum of patches, vision_hidden)
        tokens, out_grid = self.connector(features, image_grid_thw)  # (sum of tokens, text_hidden)
        counts = self.connector.config.num_tokens(grid_rows(image_grid_thw))
        return ImageFeatures(
            last_hidden_state=features,
            pooler_output=list(tokens.split(counts)),  # type: ignore[arg-type]
            hidden_states=hidden_states,
            image_grid_thw=out_grid,
            pixel_values=pixel_values,
            patch_grid_thw=torch.as_tensor(image_grid_thw),
        )

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        images: BaseModelOutputWithPooling | None,
        sample_ids: Sequence[object] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Token embeddings (B, L, H) with the visual tokens in place, and those tokens (n, H) when there are images."""
        embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if images is None:
            return embeds, None
        if input_ids is None:
            placeholder = self.get_input_embeddings()(torch.tensor(self.config.image_token_id, device=embeds.device))
            mask = (embeds == placeholder).all(dim=-1)  # (B, L)
        else:
            mask = input_ids == self.config.image_token_id  # (B, L)
        pieces = list(images.pooler_output)  # type: ignore[arg-type]
        rows = mask.sum(dim=1).tolist()
        counts = [len(piece) for piece in pieces]
        if getattr(images, "image_grid_thw", None) is None:  # cut for a chunk: image borders are gone, the sum is not
            rows, counts = [sum(rows)], [sum(counts)]
        check_placeholders(rows, counts, sample_ids if len(rows) == mask.shape[0] else None)
        features = torch.cat([piece.to(embeds.device) for piece in pieces])
        return place_features(embeds, mask, features), features

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        sample_ids: Sequence[object] | None = None,
        **kwargs: Any,
    ) -> UnclippedModelOutputWithPast:
        """Hidden states (B, L, H). attention_mask is (B, L) or a boolean (B, 1, L, L) that replaces the causal mask."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("pass exactly one of input_ids and inputs_embeds")
        images = (mm_encoder_outputs or {}).get("image")
        if images is not None and pixel_values is not None:
            raise UsageError("pass pixel_values or mm_encoder_outputs['image'], not both")
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                image_grid_thw,  # type: ignore[arg-type]
                output_hidden_states=False,
                return_dict=True,
            )
        embeds, features = self._embed(input_ids, inputs_embeds, images, sample_ids)
        kwargs.pop("mm_token_type_ids", None)  # the processor may return it; decoders have no use for it
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=usable_mask(attention_mask, self.language_model.config._attn_implementation, embeds.dtype),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return UnclippedModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=features,
        )


class UnclippedForConditionalGeneration(UnclippedPreTrainedModel, UnclippedGenerationMixin):
    """The whole model. `model` and `lm_head` take modules that are built already (assembly)."""

    # A tied head is the token embedding, which tensor parallelism cuts along the vocabulary.
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    # The class default names the usual embedding; a decoder that calls it otherwise gets its own entry on the instance.
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(
        self, config: UnclippedConfig, model: UnclippedModel | None = None, lm_head: nn.Linear | None = None
    ) -> None:
        super().__init__(config)
        _keep_weights(model, lm_head)
        self.model = model or UnclippedModel(config)
        text = config.text_config
        self.lm_head = lm_head or nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self._embedding_name()}.weight"}
        self.post_init()
        self.generation_config.suppress_tokens = [config.image_token_id]

    def _embedding_name(self) -> str:
        """Name of the token embedding inside the language model (`embed_tokens`, `wte`, …)."""
        embedding = self.model.language_model.get_input_embeddings()
        return next(name for name, module in self.model.language_model.named_modules() if module is embedding)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, image_grid_thw: ImageGrids, **kwargs: Any) -> ImageFeatures:
        """See `UnclippedModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, return_dict=True, **kwargs)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(…, H) -> (…, vocabulary)."""
        return finish_logits(self.lm_head(hidden), self.config.text_config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        supervised_only: bool = False,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        sample_ids: Sequence[object] | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> UnclippedCausalLMOutputWithPast:
        """Logits (B, L, vocabulary), and the next-token loss when `labels` (B, L; -100 = not supervised) are given.

        `shift_labels` (B, L) are labels that were shifted already, as rows cut over devices need them; they come before
        `labels`. The loss function gets all other keywords too, such as `ignore_index`.

        With `supervised_only` and labels the output layer runs at supervised places alone: logits are then
        (supervised tokens, vocabulary) in row-major order, and the loss is the same. An image placeholder is never
        supervised, whatever the labels say. `sample_ids` names the rows in errors.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            sample_ids=sample_ids,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, L, H)
        ignored = kwargs.get("ignore_index", IGNORED)
        labels, shift_labels = (
            given if given is None else given.masked_fill(given == self.config.image_token_id, ignored)
            for given in (labels, shift_labels)
        )
        supervised = labels is not None or shift_labels is not None
        if supervised and supervised_only:
            targets = shifted(labels, ignored) if shift_labels is None else shift_labels  # type: ignore[arg-type]
            wanted, shift_labels = supervised_positions(targets, ignored)
            logits = self._logits(hidden[wanted])  # (n, vocabulary)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(hidden[:, kept])
        loss = None
        if supervised:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=shift_labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        return UnclippedCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
