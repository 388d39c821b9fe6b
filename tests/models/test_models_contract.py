"""What transformers and the programs around it read off an assembled model, one attribute a test."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import ProcessorMixin

from support.prompts import ask, batch
from unclipped.models.configuration import UnclippedConfig
from unclipped.models.modeling import UnclippedForConditionalGeneration, UnclippedModel, UnclippedPreTrainedModel


def test_config(assembled: Any) -> None:
    config = assembled.model.config
    assert isinstance(config, PreTrainedConfig)
    assert config.model_type == "unclipped"
    assert dict(UnclippedConfig.sub_configs) == {"vision_config": AutoConfig, "text_config": AutoConfig}
    assert config.get_text_config() is config.text_config
    assert config.text_config.model_type == "qwen3"
    assert config.vision_config.model_type == "unclipped_llm_encoder"
    assert config.image_token_id == assembled.processor.image_token_id < config.text_config.vocab_size
    assert config.tie_word_embeddings is True


def test_config_round_trip(assembled: Any, tmp_path: Any) -> None:
    assembled.model.config.save_pretrained(tmp_path)
    again = UnclippedConfig.from_pretrained(tmp_path)
    ours = assembled.model.config
    assert again.connector == ours.connector
    assert again.image_token_id == ours.image_token_id
    assert again.text_config.to_dict() == ours.text_config.to_dict()
    assert type(again.vision_config) is type(ours.vision_config)
    assert again.vision_config.patch_size == ours.vision_config.patch_size


def test_a_default_config_can_be_made() -> None:
    assert str(UnclippedConfig().connector) == "mlp(2)"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("base_model_prefix", "model"),
        ("input_modalities", ("image", "text")),
        ("supports_gradient_checkpointing", True),
        ("_supports_sdpa", True),
        ("_supports_flash_attn", True),
        ("_supports_flex_attn", True),
        ("_supports_attention_backend", True),
        ("_can_compile_fullgraph", True),
    ],
)
def test_flag(flag: str, value: Any) -> None:
    assert getattr(UnclippedPreTrainedModel, flag) == value


def test_two_classes(assembled: Any) -> None:
    outer, inner = assembled.model, assembled.model.model
    assert isinstance(outer, PreTrainedModel)
    assert isinstance(outer, GenerationMixin)
    assert isinstance(inner, UnclippedModel)
    assert not isinstance(inner, GenerationMixin)
    assert {name for name, _ in inner.named_children()} == {"vision_tower", "connector", "language_model"}
    assert {name for name, _ in outer.named_children()} == {"model", "lm_head"}
    assert outer.base_model is inner
    assert outer.is_backend_compatible()


def test_embeddings_decoder_encoder(assembled: Any) -> None:
    outer = assembled.model
    assert outer.get_input_embeddings() is outer.model.language_model.embed_tokens
    assert outer.get_output_embeddings() is outer.lm_head
    assert outer.get_decoder() is outer.model.language_model
    assert outer.get_encoder(modality="image") is outer.model.vision_tower
    for owner in (UnclippedModel, UnclippedForConditionalGeneration):
        assert "set_input_embeddings" in vars(owner)


def test_setting_embeddings(assembled: Any) -> None:
    outer = assembled.model
    before, head = outer.get_input_embeddings(), outer.get_output_embeddings()
    new = nn.Embedding.from_pretrained(before.weight.detach().clone())
    try:
        outer.set_input_embeddings(new)
        assert outer.model.language_model.get_input_embeddings() is new
        outer.set_output_embeddings(nn.Identity())
        assert isinstance(outer.get_output_embeddings(), nn.Identity)
    finally:
        outer.set_input_embeddings(before)
        outer.set_output_embeddings(head)


def test_tied_weights_is_a_dict(assembled: Any) -> None:
    outer = assembled.model
    assert outer._tied_weights_keys == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    assert outer.lm_head.weight is outer.get_input_embeddings().weight
    assert "lm_head.weight" in outer.all_tied_weights_keys


@pytest.mark.parametrize("inner", [False, True])
def test_image_features_come_in_pooler_output(assembled: Any, inner: bool) -> None:
    model = assembled.model.model if inner else assembled.model
    inputs = batch(assembled.processor, ask("what", (16, 32), (24, 16)))
    output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert isinstance(output, ModelOutput)
    assert [len(image) for image in output.pooler_output] == [2 * 2, 3 * 1]
    assert output.pooler_output[0].shape[-1] == model.config.text_config.hidden_size
    assert output.last_hidden_state.shape[0] == len(inputs["pixel_values"])


@pytest.mark.parametrize("inner", [False, True])
def test_image_features_answer_hidden_states_and_return_dict(assembled: Any, inner: bool) -> None:
    model = assembled.model.model if inner else assembled.model
    inputs = batch(assembled.processor, ask("what", (16, 32), (24, 16), (32, 16)))
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        plain = model.get_image_features(pixels, grids)
        output = model.get_image_features(pixels, grids, output_hidden_states=True)
        first = int(grids[0].prod())
        alone = model.get_image_features(pixels[:first], grids[:1], output_hidden_states=True)
        listed = model.get_image_features(pixels, grids, return_dict=False)
    assert plain.hidden_states is None
    assert torch.equal(output.last_hidden_state, plain.last_hidden_state)
    tower = assembled.model.model.vision_tower
    assert len(output.hidden_states) == tower.depth(tower.config) + 1
    assert all(state.shape == (len(pixels), tower.width(tower.config)) for state in output.hidden_states)
    for whole, part in zip(output.hidden_states, alone.hidden_states, strict=True):
        torch.testing.assert_close(whole[:first], part, atol=1e-5, rtol=1e-4)
    last = tower.model.decoder.norm(output.hidden_states[-1])
    torch.testing.assert_close(last, output.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert isinstance(listed, tuple)
    assert torch.equal(listed[0], plain.last_hidden_state)


@pytest.mark.parametrize("keyword", ["output_attentions", "vision_feature_layer"])
def test_image_features_refuse_by_name(assembled: Any, keyword: str) -> None:
    inputs = batch(assembled.processor, ask("what", (16, 32)))
    with pytest.raises(ValueError, match=keyword):
        assembled.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], **{keyword: True})


def test_return_dict_of_the_configuration_is_followed(assembled: Any) -> None:
    model = assembled.model
    inputs = batch(assembled.processor, ask("what", (16, 16)))
    try:
        model.config.return_dict = False
        with torch.no_grad():
            assert isinstance(model(**inputs), tuple)
            assert isinstance(model(**inputs, return_dict=True), ModelOutput)
    finally:
        model.config.return_dict = True


def test_keyword_names() -> None:
    prepare = inspect.signature(UnclippedForConditionalGeneration.prepare_inputs_for_generation).parameters
    assert prepare["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    forward = inspect.signature(UnclippedForConditionalGeneration.forward).parameters
    assert {"mm_encoder_outputs", "pixel_values", "image_grid_thw", "num_items_in_batch", "logits_to_keep"} <= set(
        forward
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_pixels_only_in_the_first_iteration_or_without_cache(assembled: Any, use_cache: bool) -> None:
    inputs = batch(assembled.processor, ask("what", (16, 16)))
    first = assembled.model.prepare_inputs_for_generation(**inputs, is_first_iteration=True, use_cache=use_cache)
    later = assembled.model.prepare_inputs_for_generation(**inputs, is_first_iteration=False, use_cache=use_cache)
    assert "pixel_values" in first
    assert ("pixel_values" in later) is (not use_cache)


def test_mm_encoder_outputs_equal_pixels(assembled: Any) -> None:
    model = assembled.model
    inputs = batch(assembled.processor, ask("what", (16, 32)), ask("how many", (24, 16), (16, 16)))
    pixels, grids = inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pixels, image_grid_thw=grids).logits
        encoded = {"image": model.get_image_features(pixels, grids)}
        assert torch.equal(model(**inputs, mm_encoder_outputs=encoded).logits, expected)


def test_loss_function_is_the_causal_one(assembled: Any) -> None:
    assert assembled.model.loss_function.__name__ == "ForCausalLMLoss"


def test_attention_can_be_chosen_a_part(assembled: Any) -> None:
    """Features injected by a registered attention function must reach every layer of both towers."""
    from transformers import AttentionInterface, AutoModelForImageTextToText

    seen: set[str] = set()

    def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        seen.add(kwargs.get("marker", "no marker"))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    model = AutoModelForImageTextToText.from_pretrained(
        assembled.folder / "model", attn_implementation={"vision_config": "sdpa", "text_config": "counting"}
    )
    assert model.model.language_model.config._attn_implementation == "counting"
    assert model.model.vision_tower.model.config._attn_implementation == "sdpa"
    inputs = batch(assembled.processor, ask("what", (16, 16)))
    model(**inputs, marker="passed on")
    assert seen == {"passed on"}


def test_processor(assembled: Any) -> None:
    processor = assembled.processor
    assert isinstance(processor, ProcessorMixin)
    assert processor.image_token == "<|image|>"
    assert processor.image_token_ids == [processor.image_token_id]
    assert {"pixel_values", "image_grid_thw", "input_ids", "attention_mask"} <= set(processor.model_input_names)
    assert (
        inspect.signature(type(processor).replace_image_token).parameters["kwargs"].kind
        is inspect.Parameter.VAR_KEYWORD
    )


def test_number_of_multimodal_tokens(assembled: Any) -> None:
    processor = assembled.processor
    sizes = [(16, 32), (24, 16), (100, 333)]
    data = processor._get_num_multimodal_tokens(image_sizes=sizes)
    inputs = batch(processor, *[ask("q", size) for size in sizes])
    assert data.num_image_tokens == (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert data.num_image_patches == inputs["image_grid_thw"].prod(dim=1).tolist()
    assert sum(data.num_image_patches) == len(inputs["pixel_values"])
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_types_and_offsets_of_expanded_tokens(assembled: Any) -> None:
    from support.tiny_models import tiny_image

    processor = assembled.processor
    text = "a <|image|> b <|image|>"
    output = processor(
        text=[text],
        images=[tiny_image(16, 32), tiny_image(16, 16)],
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
    )
    ids, types = output["input_ids"][0], output["mm_token_type_ids"][0]
    assert [int(token == processor.image_token_id) for token in ids] == list(types)
    offsets = output["text_replacement_offsets"][0]
    assert [entry["span"] for entry in offsets] == [(2, 11), (14, 23)]
    assert [len(entry["replacement"]) // len("<|image|>") for entry in offsets] == [4, 2]
