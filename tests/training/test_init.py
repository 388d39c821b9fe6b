"""Pretraining that starts from an existing encoder: its weights, its statistics, its text side, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_support import VIT
from phase_support import OBJECTIVES, make_job, teacher, tiny
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Dinov2Config,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from unclipped.core.errors import CheckpointError, UnclippedError, UsageError
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.spec import declare_objective
from unclipped.encoders.vit_mae_init import initialise_vit_mae
from unclipped.objectives.autoencoder_folder import load_autoencoder
from unclipped.objectives.dino_side import load_dino_heads
from unclipped.training.pretrain import pretrain

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
ONE_STEP: dict[str, Any] = {"shape": {}, "phases": (), "steps": 1, "warmup_steps": 0}


def encoder_folder(folder: Path, family: str = "dinov2", *, declared: Any = None) -> str:
    """A saved encoder with a table of 3×3, without an image processor."""
    torch.manual_seed(3)
    encoder = build_encoder(AutoConfig.for_model(family, **WIDTHS))
    if declared is not None:
        declare_objective(encoder.model.config, declared)
    encoder.model.save_pretrained(folder)
    return str(folder)


def language_model(folder: Path) -> str:
    torch.manual_seed(4)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return f"llm:{folder}"


def trunk_of(job: Any) -> Any:
    """The trained encoder of a job, wherever its objective keeps it."""
    owners = (job.model, *(getattr(job.model, name, None) for name in ("student", "model")))
    return next(trunk for owner in owners if (trunk := getattr(owner, "trunk", owner)) and hasattr(trunk, "encoder"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_starts_from_the_weights_of_a_folder(objective: str, tmp_path: Path) -> None:
    init = encoder_folder(tmp_path / "init")
    fields: dict[str, Any] = ONE_STEP | {"init": init, "image_size": 24}
    if objective == "distill":
        fields["distill"] = {"teacher": teacher(tmp_path / "teacher"), "resize_grid": True}
    config = tiny(objective, tmp_path, **fields)
    job = make_job(config)
    mine, stored = trunk_of(job).encoder.model.state_dict(), AutoModel.from_pretrained(init).state_dict()
    assert all(torch.equal(mine[name], value) for name, value in stored.items())
    result = pretrain(config, tmp_path / "run")
    trained = AutoModel.from_pretrained(result.model_folder).state_dict()
    assert any(not torch.equal(trained[name], value) for name, value in stored.items())
    notes = result.record["stages"][0]["notes"]
    assert notes[0] == f"starts from the dinov2 {init}; images of 24×24 px, 3×3 patches"
    assert load_encoder(str(result.model_folder), baseline=True)[0].spec.image_size == (24, 24)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_an_encoder_made_of_a_language_model(objective: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"shape": {"patch_size": 8}, "init": language_model(tmp_path / "lm")}
    result = pretrain(tiny(objective, tmp_path, **fields), tmp_path / "run")
    encoder, _ = load_encoder(str(result.model_folder), baseline=True)
    assert encoder.family == "unclipped_llm_encoder"
    assert encoder.spec.patch_size == (8, 8)
    layers = load_file(tmp_path / "lm" / "model.safetensors")
    trained: Any = encoder.model.state_dict()
    name = "layers.0.self_attn.o_proj.weight"
    assert not torch.equal(trained[f"decoder.{name}"], layers[f"model.{name}"])
    torch.testing.assert_close(trained[f"decoder.{name}"], layers[f"model.{name}"], atol=0.05, rtol=0)
    assert result.record["stages"][1]["notes"] == ["images of 32×32 px, 4×4 patches"]


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_with_registers", "vit_mae"])
def test_positions_are_interpolated_once_to_the_side_of_the_recipe(family: str, tmp_path: Path) -> None:
    init = encoder_folder(tmp_path / "init", family)
    config = tiny("captioning", tmp_path, **ONE_STEP | {"init": init, "image_size": 40, "learning_rate": 1e-12})
    result = pretrain(config, tmp_path / "run")
    assert result.record["stages"][0]["notes"][0].endswith(
        "images of 40×40 px, 5×5 patches; positions interpolated from 3×3"
    )
    old, new = (load_encoder(folder)[0] for folder in (init, str(result.model_folder)))
    assert (old.spec.image_size, new.spec.image_size) == ((24, 24), (40, 40))
    patches, grid = torch.randn(25, 192), torch.tensor([[1, 5, 5]])
    with torch.no_grad():
        torch.testing.assert_close(new(patches, grid), old(patches, grid), atol=1e-5, rtol=1e-5)
    assert AutoModel.from_pretrained(result.model_folder).config.image_size == 40


@pytest.mark.parametrize("family", ["vit", "dinov2", "vit_mae"])
def test_a_masked_autoencoder_keeps_the_table_it_finds(family: str, tmp_path: Path) -> None:
    init = encoder_folder(tmp_path / "init", family)
    result = pretrain(tiny("masked_autoencoder", tmp_path, init=init, shape={}, image_size=24), tmp_path / "run")
    main, last = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run" / "stages" / "00-masked_autoencoder", result.model_folder)
    )
    name = "embeddings.position_embeddings"
    assert torch.equal(main[name], load_file(tmp_path / "init" / "model.safetensors")[name])
    assert last[name].shape == (1, 17, 16)


def test_images_keep_the_statistics_that_the_encoder_states(tmp_path: Path) -> None:
    init = encoder_folder(tmp_path / "init")
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "init" / "preprocessor_config.json").write_text(json.dumps(stated))
    result = pretrain(tiny("dinov2", tmp_path, **ONE_STEP | {"init": init, "image_size": None}), tmp_path / "run")
    saved = json.loads((result.model_folder / "preprocessor_config.json").read_text())
    assert {name: saved[name] for name in stated} == stated
    assert saved["size"] == {"height": 24, "width": 24}  # the side of its table


def test_paths_may_be_dropped_that_the_folder_does_not_drop(tmp_path: Path) -> None:
    init = encoder_folder(tmp_path / "init")
    config = tiny("dinov2", tmp_path, **ONE_STEP | {"init": init, "image_size": 24, "shape": {"drop_path_rate": 0.9}})
    job = make_job(config)
    batch = job.make_examples(config.stage()).batch([0, 1])
    trunk = trunk_of(job).train()
    assert not torch.equal(trunk(batch["global_crops"]).pooled, trunk(batch["global_crops"]).pooled)
    result = pretrain(config, tmp_path / "run")
    assert json.loads((result.model_folder / "config.json").read_text())["drop_path_rate"] == 0.0


def test_published_folders_are_taken(tmp_path: Path) -> None:
    """As the hub holds them: a ViT with a pooler and a classifier's parent, a DINOv2 with SwiGLU and a mask token."""
    ViTModel(ViTConfig(**WIDTHS, intermediate_size=32)).save_pretrained(tmp_path / "vit")
    AutoModel.from_config(Dinov2Config(**WIDTHS, use_swiglu_ffn=True)).save_pretrained(tmp_path / "webssl")
    for name in ("vit", "webssl"):
        config = tiny("dinov2", tmp_path, **ONE_STEP | {"init": str(tmp_path / name), "image_size": 40})
        result = pretrain(config, tmp_path / f"run-{name}")
        assert load_encoder(str(result.model_folder))[0].spec.image_size == (40, 40)


@pytest.mark.parametrize(("objective", "side"), [("contrastive", "text_side"), ("captioning", "caption_decoder")])
def test_the_text_side_goes_on_when_it_is_asked_to(objective: str, side: str, tmp_path: Path) -> None:
    first = pretrain(tiny(objective, tmp_path, phases=()), tmp_path / "first").model_folder
    stored = load_file(first / side / f"{side}.safetensors")
    more: dict[str, Any] = ONE_STEP | {"init": str(first), "learning_rate": 1e-12}
    for choice in ("fresh", "continue"):
        result = pretrain(tiny(objective, tmp_path, init_heads=choice, **more), tmp_path / choice)
        found = load_file(result.model_folder / side / f"{side}.safetensors")
        alike = all(torch.allclose(found[name], value, atol=1e-6) for name, value in stored.items())
        assert alike is (choice == "continue")
        notes = " ".join(result.record["stages"][0]["notes"])
        assert ("init_heads: continue would go on with it" in notes) is (choice == "fresh")
        assert (f"goes on from {first / side}" in notes) is (choice == "continue")
    longer = tiny(objective, tmp_path, init_heads="continue", **more, pairs={"context_length": 13})
    with pytest.raises(CheckpointError, match=r"misshaped \d+: "):
        pretrain(longer, tmp_path / "misfit")
    if objective == "contrastive":
        with pytest.raises(CheckpointError, match="was trained by contrastive, and here sigmoid would go on with it"):
            pretrain(tiny("sigmoid", tmp_path, init_heads="continue", **more), tmp_path / "other")
        with pytest.raises(CheckpointError, match=r"no caption_decoder/caption_decoder\.json"):
            pretrain(tiny("captioning", tmp_path, init_heads="continue", baseline=True, **more), tmp_path / "none")


def test_the_heads_and_the_mask_token_of_a_teacher_go_on(tmp_path: Path) -> None:
    first = pretrain(tiny("dinov2", tmp_path, phases=()), tmp_path / "first").model_folder
    stored = load_dino_heads(first)
    for choice in ("fresh", "continue"):
        config = tiny("dinov2", tmp_path, **ONE_STEP | {"init": str(first), "init_heads": choice, "image_size": 32})
        job = make_job(config)
        for side in (job.model.student, job.model.teacher):
            for own, kept in (
                (side.dino_head.direction, stored.named_heads()["dino_head"].direction),
                (side.ibot_head.direction, stored.named_heads()["ibot_head"].direction),
                (side.trunk.mask_token, stored.mask_token),
            ):
                assert torch.equal(own, kept) is (choice == "continue")
            assert side.trunk.encoder.spec.image_size == (32, 32)
        notes = pretrain(config, tmp_path / choice).record["stages"][0]["notes"]
        wanted = "is left aside; init_heads: continue would" if choice == "fresh" else "goes on from"
        assert wanted in notes[1]
    wider = config.dinov2.model_copy(update={"bottleneck": 12})
    with pytest.raises(
        CheckpointError, match=r"dino_heads: expected dino_head as the recipe says, .*'bottleneck': 12.*found .*: 8"
    ):
        pretrain(config.model_copy(update={"dinov2": wider}), tmp_path / "misfit")
    bare = config.model_copy(update={"init": encoder_folder(tmp_path / "bare")})
    with pytest.raises(CheckpointError, match=r"no dino_heads/dino_heads\.json in this folder"):
        pretrain(bare, tmp_path / "none")


def test_the_decoder_of_a_masked_autoencoder_goes_on(tmp_path: Path) -> None:
    options = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**WIDTHS, **options, decoder_intermediate_size=24, mask_ratio=0.5)
    torch.manual_seed(5)
    initialise_vit_mae(ViTMAEForPreTraining(config)).save_pretrained(tmp_path / "mae")
    fields: dict[str, Any] = {"init": str(tmp_path / "mae"), "init_heads": "continue", "shape": {}, "image_size": 24}
    config = tiny("masked_autoencoder", tmp_path, masked_autoencoder={}, **fields)
    expected = load_autoencoder(tmp_path / "mae").state_dict()
    mine = make_job(config).model.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in expected.items())
    result = pretrain(config, tmp_path / "run")
    assert load_encoder(str(result.model_folder))[0].spec.image_size == (32, 32)
    with pytest.raises(UsageError, match="masked_autoencoder: the folder under init names mask and decoder itself"):
        pretrain(tiny("masked_autoencoder", tmp_path, **fields), tmp_path / "section")
    other = config.model_copy(update={"init": encoder_folder(tmp_path / "vit", "vit")})
    with pytest.raises(CheckpointError, match="expected a vit_mae with its decoder, found a vit"):
        pretrain(other, tmp_path / "other")


def test_what_comes_from_a_baseline_stays_one(tmp_path: Path) -> None:
    init = encoder_folder(tmp_path / "init", declared="contrastive")
    more: dict[str, Any] = ONE_STEP | {"init": init, "image_size": 24}
    with pytest.raises(UsageError, match=r"^init: .*contrastive.*here: `baseline: true` beside init"):
        pretrain(tiny("dinov2", tmp_path, **more), tmp_path / "refused")
    result = pretrain(tiny("dinov2", tmp_path, baseline=True, **more), tmp_path / "run")
    assert load_encoder(str(result.model_folder), baseline=True)[0].spec.objective == "contrastive"
    own = pretrain(tiny("sigmoid", tmp_path, **more), tmp_path / "own")  # a declared baseline itself
    assert load_encoder(str(own.model_folder), baseline=True)[0].spec.objective == "sigmoid"


def test_what_is_no_encoder_to_train_is_refused(tmp_path: Path) -> None:
    lm, other = language_model(tmp_path / "lm"), tmp_path / "dinov3"
    AutoModel.from_config(AutoConfig.for_model("dinov3_vit", **WIDTHS, intermediate_size=32)).save_pretrained(other)
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"init": str(tmp_path / "nowhere")}, r"init: .*nowhere: no such folder"),
        ({"init": str(tmp_path / "empty")}, r"init: .*empty: no config\.json"),
        ({"init": "$NO_SUCH_VARIABLE/x"}, r"init .*NO_SUCH_VARIABLE is not set"),
        ({"init": lm.removeprefix("llm:")}, r"init: .*'qwen3' is no known vision encoder.*llm:"),
        ({"init": str(other)}, r"init: .*dinov3 holds a dinov3_vit, which is not trained here"),
        ({"init": lm, "image_size": 20}, r"image_size: 20 px are no multiple of the patch of 12×12 px"),
        ({"init": encoder_folder(tmp_path / "init"), "image_size": 20}, r"image_size: 20 px are no multiple.*8×8"),
        ({"init": str(tmp_path / "init"), "shape": VIT}, r"shape\.patch_size: the encoder under init has its shape"),
        ({"init": lm, "shape": {"patch_sise": 8}}, r"shape\.patch_sise: .*did you mean 'patch_size'"),
        (
            {"init": teacher(tmp_path / "vit"), "shape": {"drop_path_rate": 0.1}},
            r"init: .*vit has no field 'drop_path_r",
        ),
    ]
    for fields, message in cases:
        with pytest.raises(UnclippedError, match=message):
            pretrain(tiny("dinov2", tmp_path, **ONE_STEP | fields), tmp_path / "run")
    mae = encoder_folder(tmp_path / "mae", "vit_mae")
    with pytest.raises(UsageError, match="vit_mae: its patches cannot be masked"):
        pretrain(tiny("dinov2", tmp_path, **ONE_STEP | {"init": mae, "image_size": 24}), tmp_path / "run")


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("captioning", {"init_heads": "continue"}, "init_heads: continue needs the folder of an encoder"),
        ("dinov2", {"init_heads": "continue", "init": "llm:x"}, "init_heads: continue needs the folder of an encoder"),
        ("distill", {"init_heads": "continue", "init": "x"}, "init_heads: distill keeps no heads"),
        ("dinov2", {"baseline": True}, "baseline: is about the encoder under init, and there is none"),
    ],
)
def test_fields_about_init_need_it(objective: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        tiny(objective, tmp_path, **fields)
