"""Folders in the transformers format, both ways: published Web-SSL ones train here, ours load in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from support.original_vit import Computed, OriginalVit, random_planes
from support.tiny_models import tiny_image, tiny_lm
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.encoders.build import load_encoder
from unclipped.images.patches import patchify
from unclipped.models.assemble import assemble
from unclipped.models.config import ModelConfig
from unclipped.objectives.dino_side import load_dino_heads
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.training.config import PretrainConfig, StageConfig, TrainingConfig
from unclipped.training.pretrain import pretrain
from unclipped.training.run import train_stages

TRAINING = TrainingConfig(log_every_steps=1, threads=1, device="cpu")
FIXED = {"attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
         "initializer_range": 0.02, "layer_norm_eps": 1e-06, "num_attention_heads": 3, "num_channels": 3,
         "num_hidden_layers": 2, "qkv_bias": True, "torch_dtype": "float32",
         "transformers_version": "4.48.0"}  # fmt: skip
# Fields of published folders, at the width and depth of a test: Web-DINO with SwiGLU; DINOv2 with an MLP, whose
# position table is that of 518 px in the published ones; Web-MAE, an encoder without pooler.
PUBLISHED: dict[str, tuple[OriginalVit, dict[str, Any]]] = {
    "web-dino": (
        OriginalVit(patch=14, rows=16, is_gated=True),
        {"architectures": ["Dinov2Model"], "model_type": "dinov2", "apply_layernorm": True, "drop_path_rate": 0.0,
         "hidden_size": 24, "image_size": 224, "layerscale_value": 1.0, "mlp_ratio": 4, "out_features": ["stage2"],
         "out_indices": [2], "patch_size": 14, "reshape_hidden_states": True,
         "stage_names": ["stem", "stage1", "stage2"], "use_mask_token": True, "use_swiglu_ffn": True},
    ),
    "dinov2": (
        OriginalVit(patch=14, rows=8),
        {"architectures": ["Dinov2Model"], "model_type": "dinov2", "drop_path_rate": 0.0, "hidden_size": 24,
         "image_size": 112, "layerscale_value": 1.0, "mlp_ratio": 4, "patch_size": 14, "use_swiglu_ffn": False},
    ),
    "web-mae": (
        OriginalVit(patch=14, rows=16, has_layer_scale=False, has_mask_token=False),
        {"architectures": ["ViTModel"], "model_type": "vit", "encoder_stride": 16, "hidden_size": 24,
         "image_size": 224, "intermediate_size": 96, "patch_size": 14},
    ),
}  # fmt: skip
PROCESSOR = {
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor", "image_std": [0.229, 0.224, 0.225], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256},
}  # fmt: skip


def published_names(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The tensors as published folders name them (transformers 4.48)."""
    plain = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "mask_token": "embeddings.mask_token"}  # fmt: skip
    parts = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
             "attn.proj": "attention.output.dense", "ls1": "layer_scale1", "ls2": "layer_scale2",
             "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}  # fmt: skip
    if family == "vit":
        parts |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        parts |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in plain:
            named[plain[name]] = value
            continue
        place, _, kind = name.rpartition(".")
        layer = ""
        if place.startswith("blocks."):
            _, number, place = place.split(".", 2)
            layer = f"encoder.layer.{number}."
        if place == "attn.qkv":
            for part, value_of in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[f"{layer}attention.attention.{part}.{kind}"] = value_of.clone()
        else:
            named[f"{layer}{parts.get(place, place)}.{kind.replace('gamma', 'lambda1')}"] = value
    return named


@pytest.fixture(params=list(PUBLISHED))
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, OriginalVit]:
    sizes, fields = PUBLISHED[request.param]
    folder = tmp_path / request.param
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIXED | fields))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tensors = published_names(sizes.tensors(), fields["model_type"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, sizes


@torch.no_grad()
def test_a_published_folder_gives_the_features_of_its_weights(published: tuple[Path, OriginalVit]) -> None:
    folder, sizes = published
    encoder, report = load_encoder(str(folder))
    assert (report.new, report.dropped, report.statistics_from) == ((), (), "preprocessor_config.json")
    assert encoder.spec.patch_size == (14, 14)
    assert encoder.spec.image_size == (sizes.side, sizes.side)
    assert encoder.spec.mean == (0.485, 0.456, 0.406)
    planes = random_planes(sizes)
    features = encoder(patchify(planes, (14, 14)).flatten(0, 1), torch.tensor([[1, sizes.rows, sizes.rows]] * 2))
    expected = Computed(sizes.tensors()).features(planes.double().numpy(), 3)[:, 1:]
    np.testing.assert_allclose(features.unflatten(0, (2, -1)).numpy(), expected, atol=1e-5)


def test_a_published_folder_trains_in_a_vision_language_model(
    published: tuple[Path, OriginalVit], tmp_path: Path
) -> None:
    folder, _ = published
    tiny_lm(tmp_path / "lm")
    model, processor, report = assemble(
        ModelConfig(vision=str(folder), text=str(tmp_path / "lm"), connector="average(4) + mlp(2)")
    )
    before = {name: value.clone() for name, value in model.model.vision_tower.named_parameters()}
    stage = StageConfig(
        name="all", train={"vision": 1e-3, "connector": 1e-3, "text": 1e-3}, steps=2, warmup_steps=0, batch_size=2
    )
    data = DataConfig(sources=(SourceConfig(source="generated:characters"),))
    result = train_stages(model, processor, [stage], TRAINING, data, tmp_path / "run")
    assert result.record["finished"]
    assert report.vision_weights
    assert all(not torch.equal(value, before[name]) for name, value in model.model.vision_tower.named_parameters())


# ---- ours in plain transformers

SHAPES = {
    "vit": {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32},
    "dinov2": {"model_type": "dinov2", "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
               "num_attention_heads": 2, "use_swiglu_ffn": True},
    "dinov2_with_registers": {"model_type": "dinov2_with_registers", "patch_size": 8, "hidden_size": 16,
                              "num_hidden_layers": 2, "num_attention_heads": 2, "num_register_tokens": 2},
}  # fmt: skip
HEADS = {"head_hidden": 16, "bottleneck": 8, "prototypes": 12}


def pretrained(shape: str, objective: str, folder: Path) -> Path:
    options: dict[str, Any] = {
        "dinov2": {"dinov2": DinoV2Config(local_crops=1, local_size=16, **HEADS)},
        "masked_autoencoder": {"masked_autoencoder": MaskedAutoencoderConfig(decoder_width=16)},
    }[objective]
    given: dict[str, Any] = {"objective": objective, "shape": SHAPES[shape] | {"model_type": shape}, "image_size": 32}
    source = SourceConfig(source="generated:shapes")
    config = PretrainConfig(
        **given, **options, data=DataConfig(sources=(source,)), steps=2, batch_size=4, training=TRAINING
    )
    return pretrain(config, folder / "run").model_folder


@pytest.mark.parametrize("objective", ["dinov2", "masked_autoencoder"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_what_is_pretrained_here_loads_in_plain_transformers(shape: str, objective: str, tmp_path: Path) -> None:
    folder = pretrained(shape, objective, tmp_path)
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    planes = processor(images=tiny_image(40, 27), return_tensors="pt")["pixel_values"]
    assert planes.shape == (1, 3, 32, 32)
    encoder, _ = load_encoder(str(folder))
    with torch.no_grad():
        plain = model(planes).last_hidden_state[0, encoder.spec.num_prefix_tokens :]
        features = encoder(patchify(planes, (8, 8)).flatten(0, 1), torch.tensor([[1, 4, 4]]))
    torch.testing.assert_close(features, plain, atol=1e-6, rtol=0)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (encoder.spec.mean, encoder.spec.std)
    assert encoder.spec.objective == "self_supervised"
    if objective == "dinov2":  # and the teacher's heads stand beside it
        heads = load_dino_heads(folder)
        assert heads.named_heads().keys() == {"dino_head", "ibot_head"}
        assert heads.dino_head is not None
        assert heads.dino_head(plain).shape == (16, 12)
