"""Loading encoders from checkpoint folders: vision parts of whole models, strictness, and wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_factories import DECODERS, SHAPE, SQUARE, VISION
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2ForImageClassification,
    IJepaForImageClassification,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEForPreTraining,
    ViTModel,
)

from support.tiny_models import tiny_vlm
from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.vit_mae_init import initialise_vit_mae, sine_cosine_table

TEXT = {**SHAPE, "vocab_size": 40, "projection_dim": 16}
VISION_SHAPE = {**SQUARE, "projection_dim": 16}
SIGLIP2_SHAPE = {**SHAPE, "patch_size": 8, "num_patches": 16}

# Whole models: how to build one, the attribute of its vision part, and a tensor that must be dropped.
WHOLE: dict[str, tuple[Callable[[], PreTrainedModel], str, str]] = {
    "clip": (
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION_SHAPE, projection_dim=16)),
        "vision_model",
        "text_projection.weight",
    ),
    "clip_with_projection": (
        lambda: CLIPVisionModelWithProjection(VISION["clip_vision_model"]()),
        "vision_model",
        "visual_projection.weight",
    ),
    "siglip": (
        lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SQUARE)),
        "vision_model",
        "logit_scale",
    ),
    "siglip2": (
        lambda: Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=SIGLIP2_SHAPE)),
        "vision_model",
        "logit_bias",
    ),
    "vit_mae": (lambda: initialise_vit_mae(ViTMAEForPreTraining(VISION["vit_mae"]())), "vit", "decoder.mask_token"),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SQUARE)), "vit", "classifier.weight"),
    "vit_masked": (lambda: ViTForMaskedImageModeling(ViTConfig(**SQUARE, encoder_stride=8)), "vit", "decoder.0.weight"),
    "vit_pooled": (lambda: ViTModel(ViTConfig(**SQUARE)), "", "pooler.dense.weight"),
    "dinov2": (lambda: Dinov2ForImageClassification(VISION["dinov2"]()), "dinov2", "classifier.weight"),
    "ijepa": (lambda: IJepaForImageClassification(VISION["ijepa"]()), "ijepa", "classifier.weight"),
}


@pytest.mark.parametrize("name", sorted(WHOLE))
@torch.no_grad()
def test_a_whole_models_folder_gives_its_vision_part(name: str, tmp_path: Path) -> None:
    build, attribute, left_out = WHOLE[name]
    torch.manual_seed(0)
    whole = build().eval()
    whole.save_pretrained(tmp_path)
    encoder, report = load_encoder(str(tmp_path), baseline=True)
    assert not encoder.training
    assert report.new == ()
    assert left_out in report.dropped
    assert not [tensor for tensor in report.dropped if "embeddings.p" in tensor and "text" not in tensor]
    vision = getattr(whole, attribute) if attribute else whole
    state = vision.state_dict()
    for tensor, value in encoder.model.state_dict().items():
        assert torch.equal(value, state[tensor])
    assert set(report.taken) == set(encoder.model.state_dict())
    total = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert report.parameters["taken"] + report.parameters["dropped"] == total
    features = encoder(torch.randn(6, 192), torch.tensor([[1, 2, 3]]))
    assert features.shape == (6, 32)


@pytest.mark.parametrize("family", sorted(set(VISION) - {"unclipped_llm_encoder"}))
@torch.no_grad()
def test_saved_encoder_loads_by_its_folder(family: str, tmp_path: Path) -> None:
    encoder = build_encoder(VISION[family](), baseline=True).eval()
    encoder.model.save_pretrained(tmp_path)
    loaded, report = load_encoder(str(tmp_path), baseline=True, feature_layers=None)
    assert report.dropped == report.new == ()
    assert loaded.spec == encoder.spec
    patches, grid = torch.randn(6, 192), torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(patches, grid), encoder(patches, grid))


# ---- pixel statistics and licence


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        ("processor_config.json", {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}),
    ],
)
def test_statistics_and_licence_come_from_the_folder(tmp_path: Path, file: str, fields: dict[str, Any]) -> None:
    AutoModel.from_config(VISION["dinov2"]()).save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(fields))
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# Card\n")
    encoder, report = load_encoder(str(tmp_path))
    assert (encoder.spec.mean, encoder.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert report.statistics_from == file
    assert encoder.spec.licence == "apache-2.0"
    encoder, report = load_encoder(str(tmp_path), mean=(0.9,), std=(0.8,))
    assert (encoder.spec.mean, report.statistics_from) == ((0.9,) * 3, "given")


def test_statistics_default_to_the_familys(tmp_path: Path) -> None:
    AutoModel.from_config(VISION["vit"]()).save_pretrained(tmp_path)
    encoder, report = load_encoder(str(tmp_path))
    assert encoder.spec.mean == (0.5, 0.5, 0.5)
    assert report.statistics_from == "family default"


# ---- strictness


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    AutoModel.from_config(VISION["dinov2"]()).save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_all_misfits_are_listed_at_once(dinov2: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layernorm.bias"]
        tensors["layernorm.weight"] = torch.zeros(5)
        tensors["surplus.weight"] = torch.zeros(2)

    edit(dinov2, change)
    with pytest.raises(CheckpointError) as error:
        load_encoder(str(dinov2))
    message = str(error.value)
    assert "\n" not in message
    for part in (
        str(dinov2),
        "missing 1: layernorm.bias",
        "unexpected 1: surplus.weight",
        "misshaped 1: layernorm.weight (found (5,), expected (32,))",
    ):
        assert part in message


def test_an_absent_mask_token_is_new_and_no_error(dinov2: Path) -> None:
    edit(dinov2, lambda tensors: tensors.pop("embeddings.mask_token"))
    _, report = load_encoder(str(dinov2))
    assert report.new == ("embeddings.mask_token",)


# ---- wrong input: one clear line


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def unknown_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')


def broken_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{")


def odd_statistics(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5, 0.5]}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_weights, "weights cannot be read"),
        (cut_weights, "weights cannot be read"),
        (broken_config, "config.json"),
        (unknown_config, "config.json"),
        (broken_processor, "preprocessor_config.json: not valid JSON"),
        (odd_statistics, "do not belong together"),
    ],
)
def test_broken_folders_are_named(dinov2: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(dinov2)
    with pytest.raises(CheckpointError, match=words) as error:
        load_encoder(str(dinov2))
    assert str(dinov2) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["./no/such/folder", "someone/some-encoder", "llm:someone/some-model"])
def test_unreachable_sources_say_which_folder_form_works(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"config\.json and model\.safetensors") as error:
        load_encoder(source)
    assert source.removeprefix("llm:") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_config_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_encoder(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        load_encoder(str(tmp_path / "file"))


def test_a_language_model_needs_its_prefix(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(DECODERS["qwen3"]()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"llm:{tmp_path}"):
        load_encoder(str(tmp_path))


def test_an_assembled_model_is_no_encoder(tmp_path: Path) -> None:
    tiny_vlm(tmp_path / "parts", output=tmp_path / "vlm")
    with pytest.raises(CheckpointError, match=r"is an assembled model.*model\.checkpoint"):
        load_encoder(str(tmp_path / "vlm"))


def test_a_vision_model_is_no_language_model(dinov2: Path) -> None:
    with pytest.raises((CheckpointError, UsageError)) as error:
        load_encoder(f"llm:{dinov2}")
    assert "dinov2" in str(error.value)


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model", "siglip2_vision_model"])
def test_contrastive_encoders_load_as_declared_baselines_only(family: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="baseline: true"):
        build_encoder(VISION[family]())
    AutoModel.from_config(VISION[family]()).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="baseline: true"):
        load_encoder(str(tmp_path))
    encoder, _ = load_encoder(str(tmp_path), baseline=True)
    assert encoder.spec.needs_baseline_flag


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("llm:x", {"patchsize": 8}, "did you mean 'patch_size'"),
        ("x", {"patch_size": 8}, "only for encoders made of a language model"),
        ("x", {"mean": (0.5,)}, "both or neither"),
    ],
)
def test_options_out_of_place_are_named(source: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_encoder(source, **options)


def test_unknown_families_are_named() -> None:
    config = VISION["dinov2"]()
    config.model_type = "dinov22"
    with pytest.raises(UsageError, match="did you mean 'dinov2'"):
        build_encoder(config)


def test_position_tables_must_be_square() -> None:
    with pytest.raises(UsageError, match="square image_size"):
        build_encoder(ViTConfig(**{**SQUARE, "image_size": (32, 16)}))
    with pytest.raises(UsageError, match="square patches"):
        build_encoder(ViTConfig(**{**SQUARE, "patch_size": (8, 4)}))


# ---- fresh masked autoencoders


def test_a_fresh_masked_autoencoder_knows_where_patches_are() -> None:
    model = initialise_vit_mae(ViTMAEForPreTraining(VISION["vit_mae"]()))
    encoder, decoder = model.vit.embeddings, model.decoder
    for table, width in ((encoder.position_embeddings, 32), (decoder.decoder_pos_embed, 16)):
        assert table.std() > 0.1
        assert not table.requires_grad
        assert not table[:, 0].any()
        torch.testing.assert_close(table[0, 1:], sine_cosine_table(4, 4, width))
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.8)
    bound = (6 / (192 + 32)) ** 0.5  # xavier of the patch embedding seen as a linear map
    weight = encoder.patch_embeddings.projection.weight
    assert 0.9 * bound < weight.abs().max() <= bound


def test_sine_cosine_table_is_that_of_the_published_weights() -> None:
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    row_first = build_2d_sinusoidal_position_embedding(height=3, width=5, embed_dim=16, cls_token=False)
    column_first = torch.cat((row_first[..., 8:], row_first[..., :8]), dim=-1).reshape(15, 16)
    torch.testing.assert_close(sine_cosine_table(3, 5, 16), column_first.float(), atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="divisible by 4"):
        sine_cosine_table(2, 2, 6)


@torch.no_grad()
def test_a_masked_autoencoder_is_not_masked_whatever_its_checkpoint_says(tmp_path: Path) -> None:
    config = VISION["vit_mae"]()
    config.mask_ratio = 0.75
    initialise_vit_mae(ViTMAEForPreTraining(config)).save_pretrained(tmp_path)
    encoder, _ = load_encoder(str(tmp_path))
    patches, grid = torch.randn(16, 192), torch.tensor([[1, 4, 4]])
    features = encoder(patches, grid)
    assert features.shape == (16, 32)
    assert torch.equal(encoder(patches, grid), features)  # no random order either
    assert encoder.model.embeddings.position_embeddings.std() > 0.1
