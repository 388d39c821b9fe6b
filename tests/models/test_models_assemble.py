"""Assembly: what each option does, what is refused and how the refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from support.prompts import ask, batch
from support.tiny_models import tiny_encoder, tiny_lm, tiny_tokenizer, tiny_vision_config, tiny_vlm
from unclipped.core.errors import CheckpointError, UsageError
from unclipped.images.config import ImageRule
from unclipped.models.assemble import assemble
from unclipped.models.checkpoint import save_model
from unclipped.models.config import ImageSettings, ModelConfig
from unclipped.recipes.validation import validate


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `text` (a language model), `dinov2` and `clip` (encoders)."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_lm(folder / "text")
    tiny_encoder(folder / "dinov2", "dinov2")
    tiny_encoder(folder / "clip", "clip_vision_model")
    return folder


def same(first: Any, second: Any, part: str = "") -> bool:
    """Whether two models' tensors, or those of one part, are equal bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours if part in key)


def test_the_encoder_made_from_the_language_model_has_its_layers(assembled: Any) -> None:
    decoder = assembled.model.model.language_model.state_dict()
    encoder = assembled.model.model.vision_tower.model.decoder.state_dict()
    assert encoder
    assert all(torch.equal(encoder[name], decoder[name]) for name in encoder)
    pointers = {parameter.data_ptr() for parameter in assembled.model.model.language_model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in assembled.model.model.vision_tower.parameters()}


def test_the_report_says_what_was_done(assembled: Any) -> None:
    report = assembled.report
    assert report.objective == "llm_init"
    assert report.connector == "average(1x2) + mlp(2)"
    assert report.chat_template == "own"
    assert report.image_rule["merge"] == [1, 2]
    assert json.loads(json.dumps(report.to_dict()))["parameters"][-1]["part"] == "all"
    assert any("padding <|pad|>" in line for line in report.lines())


def assembled_of(vision: Any, text: Path | str, connector: str = "mlp(2)", **options: Any) -> tuple[Any, Any, Any]:
    """Assemble through the configuration, as every caller does; a mistake in it is the UsageError of a recipe."""
    fields = {"vision": vision, "text": str(text), "connector": connector} | options
    return assemble(validate(fields, ModelConfig, "model"))


def test_the_seed_alone_determines_new_weights(parts: Path) -> None:
    def build(seed: int) -> Any:
        torch.manual_seed(torch.randint(1000, ()).item())
        return assembled_of({"llm": str(parts / "text"), "patch_size": 8}, parts / "text", seed=seed)[0]

    state = torch.random.get_rng_state()
    first, second, third = build(1), build(1), build(2)
    assert same(first, second)
    assert not same(first, third, "connector")
    assert not same(first, third, "stem")
    torch.random.set_rng_state(state)
    assembled_of(str(parts / "dinov2"), str(parts / "text"))
    assert torch.equal(torch.random.get_rng_state(), state), "assembly leaves the caller's random state alone"


def test_random_vision_keeps_the_shape(parts: Path) -> None:
    for source in (str(parts / "dinov2"), f"llm:{parts / 'text'}"):
        loaded, _, _ = assembled_of(source, str(parts / "text"), seed=5)
        random, _, report = assembled_of(source, str(parts / "text"), random_vision=True, seed=5)
        assert loaded.state_dict().keys() == random.state_dict().keys()
        assert not same(loaded, random, "vision_tower")
        assert same(loaded, random, "connector"), "arms of a comparison differ in the encoder alone"
        assert same(loaded, random, "language_model")
        assert report.objective == "none"
        assert "random weights" in report.vision_weights


def test_an_inline_configuration_trains_from_scratch(parts: Path) -> None:
    model, processor, report = assembled_of(
        tiny_vision_config("vit").to_dict() | {"model_type": "vit"}, str(parts / "text"), "linear"
    )
    assert report.vision == "vit"
    assert processor.image_processor.size == (16, 16)
    assert model(**batch(processor, ask("what", (20, 30)))).logits.isfinite().all()


def test_feature_layers_widen_the_connector(parts: Path) -> None:
    model, processor, _ = assembled_of(str(parts / "dinov2"), str(parts / "text"), "linear", feature_layers=[1, -1])
    assert model.model.connector.vision_hidden == 64
    assert model.config.vision_feature_layers == [1, -1]
    assert model(**batch(processor, ask("what", (16, 16)))).logits.isfinite().all()


def test_embedding_start(parts: Path) -> None:
    config = ModelConfig(
        vision=str(parts / "dinov2"), text=str(parts / "text"), connector="linear", connector_init="embedding"
    )
    model, _, _ = assemble(config)
    embeddings = model.get_input_embeddings().weight
    last = model.model.connector.projection[-1]
    torch.testing.assert_close(last.bias, embeddings.mean(dim=0))
    assert last.weight.std().item() == pytest.approx(embeddings.std().item() / 32**0.5, rel=0.1)
    assert model.config.connector.init == "embedding"


def test_one_channel_and_convolution_stem(parts: Path) -> None:
    model, processor, _ = assembled_of(
        {
            "llm": str(parts / "text"),
            "patch_size": (32, 8),
            "stem": "convolution",
            "rope": "penguin",
            "rope_theta": 100.0,
        },
        parts / "text",
        image={"channels": 1, "fixed_height": 32, "max_tokens": 20, "mean": 0.8, "std": 0.3},
    )
    assert model.config.vision_config.rope_form == "penguin"
    inputs = batch(processor, ask("what", (16, 60)))
    assert inputs["image_grid_thw"].tolist() == [[1, 1, 15]]
    assert inputs["pixel_values"].shape == (15, 32 * 8)
    assert model(**inputs).logits.isfinite().all()


def test_an_encoder_of_one_size_squashes(parts: Path) -> None:
    _, processor, report = assembled_of(str(parts / "dinov2"), str(parts / "text"), "pixel_shuffle(2) + linear")
    assert report.image_rule["rule"] == "squash"
    assert processor.num_image_tokens(batch(processor, ask("what", (30, 90)))["image_grid_thw"]) == [1]
    _, native, _ = assembled_of(str(parts / "dinov2"), str(parts / "text"), image={"rule": "native", "max_tokens": 9})
    assert batch(native, ask("what", (8, 90)))["image_grid_thw"][0].prod() <= 9


@pytest.mark.parametrize("pad", [True, False])
def test_a_language_model_without_template_or_padding(tmp_path: Path, pad: bool) -> None:
    tokenizer = tiny_tokenizer(compact=False, pad=pad)
    model, processor, report = tiny_vlm(tmp_path, "dinov2", tokenizer=tokenizer, output=tmp_path / "out")
    assert report.chat_template == "default"
    assert report.pad_token == ("<|padding|>" if pad else "<|endoftext|>")
    assert report.tokens_added == 1
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    inputs = batch(processor, ask("what", (16, 16)), ask("how many circles"))
    assert processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=False).endswith(
        "User:\n" + "<image>" * 4 + "\nwhat\n\nAssistant:\n"
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_a_template_for_text_learns_images(tmp_path: Path) -> None:
    template = "{%- for m in messages -%}[{{ m['role'] }}]{{ m['content'] | trim }}{%- endfor -%}"
    tokenizer = tiny_tokenizer(compact=False, template=template)
    _, processor, report = tiny_vlm(tmp_path, "dinov2", tokenizer=tokenizer)
    assert report.chat_template == "own, adapted to images"
    assert processor.apply_chat_template(ask("what", (16, 16))) == "[user]<image>\nwhat"


def test_an_image_token_that_is_there_is_used(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(compact=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|image_pad|>"]})
    _, processor, report = tiny_vlm(tmp_path, "dinov2", tokenizer=tokenizer)
    assert (processor.image_token, report.tokens_added) == ("<|image_pad|>", 0)


def test_a_padded_vocabulary_needs_no_new_row(tmp_path: Path) -> None:
    model, processor, report = tiny_vlm(
        tmp_path, "dinov2", tokenizer=tiny_tokenizer(compact=False), lm_overrides={"vocab_size": 320}
    )
    assert report.tokens_added == 0
    assert processor.image_token_id == 300
    assert model.config.text_config.vocab_size == 320


def test_bfloat16(parts: Path) -> None:
    model, processor, _ = assembled_of({"llm": str(parts / "text"), "patch_size": 8}, parts / "text", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = batch(processor, ask("what", (16, 16)))
    assert model(**inputs).logits.dtype == torch.bfloat16
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_from_a_checkpoint(assembled: Any) -> None:
    config = ModelConfig(checkpoint=str(assembled.folder / "model"), image={"max_tokens": 5, "mean": 0.8, "std": 0.2})
    model, processor, _ = assemble(config)
    assert same(model, assembled.model)
    assert processor.image_processor.max_tokens == 5
    assert processor.image_processor.mean == (0.8, 0.8, 0.8)
    assert processor.image_processor.patch_size == (8, 8)


def test_the_first_layers_of_a_language_model_are_the_encoder(tmp_path: Path) -> None:
    tiny_lm(tmp_path / "text", layers=4)
    source = {"llm": str(tmp_path / "text"), "patch_size": 8}
    model, processor, report = assembled_of(source | {"layers": 2}, tmp_path / "text")
    whole, _, _ = assembled_of(source, tmp_path / "text")
    tower, reference = model.model.vision_tower, whole.model.vision_tower
    assert tower.model.config.num_hidden_layers == 2
    assert "dropped" in report.vision_weights
    tower.model.stem.load_state_dict(reference.model.stem.state_dict())  # drawn after layers of another number
    inputs = batch(processor, ask("what", (16, 24)))
    seen: list[torch.Tensor] = []
    hook = reference.model.decoder.layers[1].register_forward_hook(
        lambda module, given, found: seen.append(found if isinstance(found, torch.Tensor) else found[0])
    )
    reference(inputs["pixel_values"], inputs["image_grid_thw"])
    hook.remove()
    features = tower(inputs["pixel_values"], inputs["image_grid_thw"])
    expected = reference.model.decoder.norm(seen[0]).reshape(features.shape)
    torch.testing.assert_close(features, expected)
    save_model(model, processor, tmp_path / "out")
    from unclipped.models.checkpoint import load_model

    assert same(load_model(tmp_path / "out")[0], model)
    equal, _, _ = assembled_of(source | {"layers": 4}, tmp_path / "text")
    assert same(equal, whole)
    with pytest.raises(UsageError, match="has 4 layers, found 5"):
        assembled_of(source | {"layers": 5}, tmp_path / "text")


def test_the_text_form_of_a_language_model_is_the_value(parts: Path) -> None:
    text, value = (ModelConfig(vision=v, text="t") for v in (f"llm:{parts}", {"llm": str(parts)}))
    assert text == value
    assert ModelConfig.model_validate(text.model_dump(mode="json")) == text
    assert str(text.vision) == f"llm:{parts}"


BAD = [
    ("clip", "text", {}, UsageError, "declared baseline only"),
    ("dinov2", "dinov2", {}, CheckpointError, "no causal language model of type 'dinov2'|not a text-only decoder"),
    ("missing-folder/x", "text", {}, CheckpointError, "no such folder"),
    ("dinov2", "missing-folder/x", {}, CheckpointError, "no such folder, and it could not be fetched as a hub id"),
    ("dinov2", "text", {"connector": "average(3) + mlp"}, UsageError, "no multiple of patch_size"),
    ("dinov2", "text", {"connector": "averag(3) + mlp"}, UsageError, "did you mean 'average'"),
    ("dinov2", "text", {"image": {"channels": 1}}, UsageError, "image.channels: the encoder takes 3, found 1"),
    ("dinov2", "text", {"image": {"rule": "native", "size": (16, 16)}}, UsageError, "native has no size"),
    ("dinov2", "text", {"connector": "average(2) + mlp", "image": {"merge": 1}}, UsageError, "needs multiples of 2x2"),
    ("dinov2", "text", {"feature_layers": [9]}, UsageError, "9 is out of range"),
    ({"model_type": "vitt"}, "text", {}, UsageError, "vitt"),
]


@pytest.mark.parametrize(("vision", "text", "options", "error", "message"), BAD, ids=[str(row[4]) for row in BAD])
def test_refusals(
    parts: Path, vision: Any, text: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    source = vision if isinstance(vision, dict) or "missing" in vision else str(parts / vision)
    with pytest.raises(error, match=message) as caught:
        assembled_of(source, text if "missing" in text else str(parts / text), **options)
    assert "\n" not in str(caught.value)


def test_a_contrastive_encoder_loads_as_a_declared_baseline(parts: Path, tmp_path: Path) -> None:
    from unclipped.models.checkpoint import load_model

    model, processor, report = assembled_of(str(parts / "clip"), str(parts / "text"), baseline=True)
    assert report.objective == "contrastive"
    assert model.config.baseline is True
    save_model(model, processor, tmp_path / "out")
    assert same(load_model(tmp_path / "out")[0], model)


def test_language_models_that_do_not_fit(tmp_path: Path, parts: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_lm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors["model.extra"] = torch.zeros(1)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        assembled_of(str(parts / "dinov2"), str(tmp_path))
    for part in ("missing 1: model.norm.weight", "unexpected 1: model.extra", "up_proj.weight (found (3, 3), expected"):
        assert part in str(caught.value)
    (tmp_path / "tokenizer.json").unlink()
    tiny_lm().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        assembled_of(str(parts / "dinov2"), str(tmp_path))


def test_tokenizers_that_do_not_fit(tmp_path: Path, parts: Path) -> None:
    tiny_lm(tmp_path, vocab_size=200)
    with pytest.raises(CheckpointError, match="the tokenizer has 300 tokens, the model's vocabulary is 200"):
        assembled_of(str(parts / "dinov2"), str(tmp_path))
    tokenizer = tiny_tokenizer(compact=False)
    tokenizer.eos_token = None
    tiny_lm(tmp_path / "b").save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(CheckpointError, match="names no eos_token"):
        assembled_of(str(parts / "dinov2"), str(tmp_path / "b"))


def test_a_language_model_that_does_something_else_to_logits_is_refused(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unclipped.models.modeling as modeling

    monkeypatch.setattr(modeling, "finish_logits", lambda logits, config: logits * 0.5)
    with pytest.raises(CheckpointError, match="logits differ from the language model's own by"):
        assembled_of(str(parts / "dinov2"), str(parts / "text"))


def test_image_settings_cover_the_image_rule() -> None:
    assert set(ImageSettings.model_fields) == set(ImageRule.model_fields) - {"patch_size"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision": "a"}, "give both vision and text, or checkpoint alone"),
        ({"checkpoint": "a", "text": "b"}, "checkpoint is a whole model, so text cannot be set beside it"),
        ({"checkpoint": "a", "connector": "mlp(2)"}, "so connector cannot be set beside it"),  # at its default, too
        ({"checkpoint": "a", "image": {"channels": 1}}, "belong to the checkpoint"),
        ({"vision": {}, "text": "b"}, "needs 'model_type'"),
        ({"vision": "a", "text": "b", "connector": "mpl"}, "did you mean 'mlp'"),
        ({"vision": "a", "text": "b", "visoin": 1}, "Extra inputs"),
        ({"vision": {"llm": "a", "rope_theta": -1.0}, "text": "b"}, "greater than 0"),
    ],
)
def test_the_recipe_section_is_strict(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)
