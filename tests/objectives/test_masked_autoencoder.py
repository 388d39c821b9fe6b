"""Masked autoencoding: parity with ViTMAE of transformers and with NumPy, every family, what is seen and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from support.gradients import has_true_gradients
from unclipped.core.errors import UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.encoders.build import load_encoder
from unclipped.encoders.vit_mae_init import initialise_vit_mae
from unclipped.images.patches import patchify
from unclipped.objectives.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderObjective
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.objectives.trunk import FAMILIES, build_trunk
from unclipped.training.config import OptimizerConfig, PretrainConfig, TrainingConfig
from unclipped.training.image_pretraining import build_autoencoder
from unclipped.training.pretrain import pretrain

SMALL: dict[str, Any] = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
MAE = SMALL | {
    "image_size": 32,
    "intermediate_size": 48,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40,
    "norm_pix_loss": True,
}


def shape_of(family: str) -> dict[str, Any]:
    if family == "unclipped_llm_encoder":
        return {"model_type": family, "patch_size": 8, "text_config": DECODER}
    return {"model_type": family} | SMALL


def autoencoder(family: str = "vit", **options: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    if family == "vit_mae":
        return build_autoencoder(MAE | {"decoder_num_hidden_layers": 2})
    return build_autoencoder(shape_of(family), 32, MaskedAutoencoderConfig(**options))


def examples(images: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "noise": torch.rand(images, 16, generator=generator)}


def paired(**fields: Any) -> tuple[ViTMAEForPreTraining, MaskedAutoencoder, list[tuple[str, Any]]]:
    """transformers' model, ours with its weights, and pairs of (its parameter's name, what of ours holds it)."""
    torch.manual_seed(0)
    config: Any = ViTMAEConfig(**(MAE | {"decoder_num_hidden_layers": 2} | fields))
    theirs = initialise_vit_mae(ViTMAEForPreTraining(config))
    ours = build_autoencoder(MAE | {"decoder_num_hidden_layers": 2} | fields)
    ours.trunk.encoder.model.load_state_dict(theirs.vit.state_dict())
    own = {f"vit.{name}": value for name, value in ours.trunk.encoder.model.named_parameters()}
    decoder, width = ours.decoder, ours.decoder.width
    # A patch's values run row, column, channel there, and channel, row, column here.
    values = torch.arange(3 * 64).view(3, 8, 8).permute(1, 2, 0).flatten()
    pairs: list[tuple[str, Any]] = [(name, (value, ...)) for name, value in own.items()]
    pairs.append(("decoder.mask_token", (decoder.mask_token, ...)))
    names = {"decoder_embed": decoder.embed, "decoder_norm": decoder.norm}
    for number, block in enumerate(decoder.blocks):
        layer = f"decoder_layers.{number}"
        for index, part in enumerate("qkv"):
            for kind in ("weight", "bias"):
                rows = slice(index * width, (index + 1) * width)
                pairs.append((f"decoder.{layer}.attention.{part}_proj.{kind}", (getattr(block.qkv, kind), rows)))
        names |= {f"{layer}.attention.o_proj": block.out, f"{layer}.mlp.fc1": block.up, f"{layer}.mlp.fc2": block.down}
        names |= {f"{layer}.layernorm_before": block.norm1, f"{layer}.layernorm_after": block.norm2}
    for name, module in names.items():
        pairs += [(f"decoder.{name}.{kind}", (getattr(module, kind), ...)) for kind in ("weight", "bias")]
    pairs += [(f"decoder.decoder_pred.{kind}", (getattr(decoder.predict, kind), values)) for kind in ("weight", "bias")]
    trained = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, (parameter, rows) in pairs:
            parameter[rows] = trained[name].view_as(parameter[rows])
    assert {name for name, _ in pairs} == {name for name, value in trained.items() if value.requires_grad}
    return theirs, ours, pairs


@pytest.mark.parametrize("fields", [{}, {"norm_pix_loss": False}, {"mask_ratio": 0.4}])
def test_loss_and_gradients_are_those_of_transformers(fields: dict[str, Any]) -> None:
    theirs, ours, pairs = paired(**fields)
    expected = theirs(**examples())
    objective = MaskedAutoencoderObjective(ours)
    loss = objective(**examples())["loss"]
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    filled = ours(*examples().values())
    logits = expected.logits.unflatten(2, (8, 8, 3)).permute(0, 1, 4, 2, 3).flatten(2)  # channel, row, column
    places = filled.hidden[..., None].expand(-1, -1, 192)
    torch.testing.assert_close(filled.predicted, logits.gather(1, places), atol=1e-5, rtol=0)
    expected.loss.backward()
    loss.backward()
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    for name, (parameter, rows) in pairs:
        own = parameter.grad[rows]
        torch.testing.assert_close(own, gradients[name].view_as(own), atol=1e-5, rtol=0, msg=name)


def test_targets_and_loss_are_those_of_numpy() -> None:
    model, batch = autoencoder(), examples()
    filled = model(batch["pixel_values"], batch["noise"])
    loss = MaskedAutoencoderObjective(model)(**batch)["loss"]
    pixels, noise = (batch[name].numpy().astype(np.float64) for name in ("pixel_values", "noise"))
    total = []
    for image, values, predicted, hidden in zip(pixels, noise, filled.predicted, filled.hidden, strict=True):
        assert sorted(hidden.tolist()) == sorted(np.argsort(values)[4:].tolist())
        for place, guess in zip(hidden.tolist(), predicted.detach().numpy(), strict=True):
            top, left = 8 * (place // 4), 8 * (place % 4)
            patch = image[:, top : top + 8, left : left + 8].reshape(-1)
            target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            total.append(np.mean((guess - target) ** 2))
    assert loss.item() == pytest.approx(np.mean(total), rel=1e-5)


def test_gradients_of_the_loss() -> None:
    objective = MaskedAutoencoderObjective(autoencoder()).double()
    assert has_true_gradients(objective, {name: value.double() for name, value in examples(2).items()})


@pytest.mark.parametrize("family", [*FAMILIES, "vit_mae"])
def test_every_family_learns_and_every_parameter_gets_a_gradient(family: str) -> None:
    objective = MaskedAutoencoderObjective(autoencoder(family))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = objective(**examples())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = [name for name, value in objective.named_parameters() if value.grad is None or not value.grad.any()]
    assert [name for name in without if not name.endswith("k_proj.bias")] == []  # a key's bias shifts all scores alike
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", [*FAMILIES, "vit_mae"])
def test_hidden_pixels_change_no_prediction_and_places_matter(family: str) -> None:
    model, batch = autoencoder(family).eval(), examples(1)
    pixels, noise = batch["pixel_values"], batch["noise"]
    filled = model(pixels, noise)
    assert filled.predicted.shape == (1, 12, 192)
    patches = patchify(pixels, (8, 8))
    changed = pixels.clone()
    place = int(filled.hidden[0, 0])
    top, left = 8 * (place // 4), 8 * (place % 4)
    changed[..., top : top + 8, left : left + 8] += 1
    assert not torch.equal(patchify(changed, (8, 8)), patches)
    torch.testing.assert_close(model(changed, noise).predicted, filled.predicted)
    assert not torch.allclose(filled.predicted[0, 0], filled.predicted[0, 1])


def test_the_order_of_the_noise_does_not_matter_within_visible_and_hidden() -> None:
    model, batch = autoencoder(decoder_blocks=3).eval(), examples()
    objective = MaskedAutoencoderObjective(model)
    order = batch["noise"].argsort(dim=1)
    other = torch.cat((order[:, :4].flip(1), order[:, 4:].flip(1)), dim=1)
    noise = torch.empty(3, 16).scatter_(1, other, torch.arange(16.0).expand(3, -1))
    same = objective(pixel_values=batch["pixel_values"], noise=noise)["loss"]
    torch.testing.assert_close(same, objective(**batch)["loss"])


def test_without_a_mask_all_is_seen_and_predicted() -> None:
    model, batch = autoencoder(mask_ratio=0.0, normalise_pixels=False), examples()
    filled = model(batch["pixel_values"], batch["noise"])
    assert filled.predicted.shape == (3, 16, 192)
    targets = model.targets(batch["pixel_values"], filled.hidden)
    assert torch.equal(targets[0, 0], patchify(batch["pixel_values"], (8, 8))[0, filled.hidden[0, 0]])
    assert MaskedAutoencoderObjective(model).num_tokens(batch) == 3 * 16


def test_health_is_measured_on_whole_images() -> None:
    objective = MaskedAutoencoderObjective(autoencoder().eval())
    with torch.no_grad():
        health = objective.health(examples(6))
    assert health["images"] == 6
    assert 1 < health["rank"] <= 6
    assert health["spread"] > 0
    assert objective.num_tokens(examples(6)) == 6 * 4


@pytest.mark.parametrize("family", [*FAMILIES, "vit_mae"])
def test_pretraining_saves_an_encoder_that_loads(family: str, tmp_path: Path) -> None:
    mae = MAE | {"decoder_num_hidden_layers": 1, "model_type": family}
    config = PretrainConfig(
        objective="masked_autoencoder",
        shape=mae if family == "vit_mae" else shape_of(family),
        data=DataConfig(sources=(SourceConfig(source="generated:shapes", limit=8),)),
        steps=2,
        batch_size=4,
        image_size=32,
        training=TrainingConfig(optimizer=OptimizerConfig(), threads=1, device="cpu"),
    )
    result = pretrain(config, tmp_path / "run")
    encoder, _ = load_encoder(str(result.model_folder))
    assert encoder.family == family
    assert encoder.spec.objective == "self_supervised"
    assert sorted(path.name for path in (tmp_path / "run" / "pictures").rglob("reconstruction*.png"))
    if family == "vit":
        model, info = ViTModel.from_pretrained(result.model_folder, add_pooling_layer=False, output_loading_info=True)
        assert not info["missing_keys"]
        patches, grid = torch.randn(16, 192), torch.tensor([[1, 4, 4]])
        planes = patches.view(4, 4, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(1, 3, 32, 32)
        torch.testing.assert_close(encoder(patches, grid), model(planes).last_hidden_state[0, 1:])
    if family == "vit_mae":
        assert ViTMAEConfig.from_pretrained(result.model_folder).mask_ratio == 0.75


def test_what_it_refuses() -> None:
    trunk = build_trunk(shape_of("vit"), image_size=32)
    with pytest.raises(UsageError, match="decoder's width 18 is no multiple of four and of its 4 heads"):
        MaskedAutoencoder(trunk, MaskedAutoencoderConfig(decoder_width=18))
    with pytest.raises(UsageError, match=r"mask_ratio 0\.95 leaves none of 16 patches visible"):
        autoencoder(mask_ratio=0.95)(*examples().values())
    table: Any = trunk.encoder.model.get_submodule("embeddings")
    table.position_embeddings.data.zero_()
    with pytest.raises(UsageError, match="the encoder's position table is constant"):
        MaskedAutoencoder(trunk, MaskedAutoencoderConfig())
