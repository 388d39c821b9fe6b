"""The recipes of Web-SSL (arXiv 2504.01017) say what its table says, figure by figure."""

from __future__ import annotations

import math

import pytest

from unclipped.data.views_config import dinov2_colours
from unclipped.encoders.vit_shapes import named_shape
from unclipped.objectives.block_masks import ASPECT, SMALLEST_BLOCK
from unclipped.recipes.schema import PretrainRecipe
from unclipped.recipes.validation import load_recipe


def test_webdino_is_its_table() -> None:
    recipe = load_recipe("webdino-1b", PretrainRecipe, [])
    dino, optimizer, stage = recipe.dinov2, recipe.training.optimizer, recipe.stage()
    assert recipe.objective == "dinov2"
    assert recipe.shape == {"name": "webdino-1b", "drop_path_rate": 0.4}
    shape = named_shape("webdino-1b")
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]) == (1536, 40, 24)
    assert (shape["patch_size"], shape["layerscale_value"]) == (14, 1e-5)
    # Views
    assert (recipe.image_size, dino.local_size, dino.local_crops) == (224, 98, 8)
    assert (dino.global_scale, dino.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert dino.colours is None  # those of DINOv2:
    for colours, blur, solarise in zip(dinov2_colours(224), (1.0, 0.1, 0.5), (0.0, 0.2, 0.0), strict=True):
        assert (colours.jitter, colours.brightness, colours.contrast, colours.saturation, colours.hue) == (
            0.8, 0.4, 0.4, 0.2, 0.1,
        )  # fmt: skip
        assert (colours.grey, colours.blur, colours.solarise) == (0.2, blur, solarise)
    # Heads
    assert (dino.head_hidden, dino.bottleneck, dino.ibot_bottleneck, dino.prototypes) == (2048, 384, 256, 131_072)
    # Targets
    assert (dino.centring, dino.sinkhorn_iterations) == ("sinkhorn", 3)
    assert (dino.teacher_temperature, dino.teacher_temperature_steps) == ((0.04, 0.07), 37_500)
    assert dino.student_temperature == 0.1
    # Losses and masks
    assert (dino.ibot_weight, dino.koleo_weight) == (1.0, 0.1)
    assert (dino.masked_share, dino.mask_ratio) == (0.5, (0.1, 0.5))
    assert (ASPECT[0], round(ASPECT[1], 1), SMALLEST_BLOCK) == (0.3, 3.3, 4)
    # Optimiser and schedules
    assert (recipe.batch_size, stage.train, stage.warmup_steps) == (3072, {"vision": 3.5e-4}, 100_000)
    assert stage.train["vision"] == pytest.approx(2e-4 * math.sqrt(3072 / 1024), rel=0.02)
    assert recipe.steps == pytest.approx(2e9 / 3072, abs=1)
    assert (stage.schedule, stage.schedule_length) == ("cosine", 625_000)
    assert stage.final_ratio * stage.train["vision"] == pytest.approx(1e-6)
    assert (optimizer.name, optimizer.betas) == ("adamw", (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.final_weight_decay) == (0.04, 0.2)
    assert (optimizer.patch_embedding_factor, optimizer.layer_decay) == (0.2, 1.0)
    assert (stage.clip_norm, stage.clip_per_module) == (3.0, True)
    assert dino.frozen_prototype_steps == 1_250
    assert dino.teacher_momentum == (0.994, 1.0)
    assert recipe.training.parallel == "fsdp2"


def test_the_high_resolution_phases_are_those_of_the_table() -> None:
    recipe = load_recipe("webdino-1b-highres", PretrainRecipe, [])
    main, *phases = recipe.stages()
    assert main == load_recipe("webdino-1b", PretrainRecipe, []).stage()
    assert [phase.image_size for phase in recipe.phases] == [378, 518]
    for phase in phases:
        assert (phase.steps, phase.batch_size, phase.train) == (20_000, 2048, {"vision": 1.41e-5})
        assert phase.final_ratio * phase.train["vision"] == pytest.approx(1e-6)
        assert phase.warmup_steps == 100_000 * 20_000 // 651_042  # courses are those of the main stage, compressed
        assert phase.schedule_length == 625_000 * 20_000 // 651_042
        assert (phase.clip_norm, phase.clip_per_module) == (3.0, True)


def test_webmae_is_its_table() -> None:
    recipe = load_recipe("webmae-1b", PretrainRecipe, [])
    mae, optimizer, stage = recipe.masked_autoencoder, recipe.training.optimizer, recipe.stage()
    assert (recipe.objective, recipe.shape) == ("masked_autoencoder", {"name": "webmae-1b"})
    assert (mae.mask_ratio, mae.normalise_pixels) == (0.75, True)
    assert (mae.decoder_blocks, mae.decoder_width, mae.decoder_heads, mae.decoder_hidden) == (8, 512, 16, None)
    assert (optimizer.name, optimizer.betas, optimizer.weight_decay) == ("adamw", (0.9, 0.95), 0.05)
    assert (stage.train, stage.warmup_steps, recipe.batch_size) == ({"vision": 1.6e-3}, 80_000, 4096)
    assert (stage.schedule, stage.final_ratio, stage.clip_norm) == ("cosine", 0.0, None)
    assert recipe.steps == pytest.approx(2e9 / 4096, abs=1)
    assert recipe.data.augment is not None
    (crop,) = recipe.data.augment.steps
    assert (crop.kind, crop.minimum_area) == ("random_crop", 0.2)
    assert crop.aspect == pytest.approx(4 / 3)
    assert recipe.flip
    assert not crop.flip  # mirrored once, by half


def test_only_the_data_path_is_missing() -> None:
    for name in ("webdino-1b", "webdino-1b-highres", "webmae-1b"):
        recipe = load_recipe(name, PretrainRecipe, ["data.sources.0.source=/my/images"])
        assert [source.source for source in recipe.data.sources] == ["/my/images"]
        assert not recipe.data.sources[0].options
