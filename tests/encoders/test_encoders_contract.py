"""One contract for every registered encoder and for an encoder made of each kind of language model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from encoder_factories import ALL, VISION, direct_features
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from unclipped.core.errors import DataError, UsageError
from unclipped.encoders.base import ENCODERS, VisionEncoder
from unclipped.encoders.build import build_encoder
from unclipped.encoders.spec import OBJECTIVES
from unclipped.images.patches import patchify

# Non-square grids, equal ones apart from each other, a native square one, and one of equal token count.
GRIDS = [(2, 3), (1, 5), (4, 4), (2, 3), (3, 2)]


def build(name: str, **options: Any) -> VisionEncoder:
    torch.manual_seed(0)
    return build_encoder(ALL[name](), baseline=True, **options).eval()


def images_for(encoder: VisionEncoder, grids: list[tuple[int, int]] = GRIDS) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random planes with their packed patches and grids."""
    height, width = encoder.spec.patch_size
    planes = [torch.randn(encoder.spec.channels, h * height, w * width) for h, w in grids]
    patches = torch.cat([patchify(plane, encoder.spec.patch_size) for plane in planes])
    return planes, patches, torch.tensor([[1, h, w] for h, w in grids])


def test_every_registered_family_has_a_tiny_member() -> None:
    assert set(VISION) == set(ENCODERS.names())


@pytest.fixture(params=sorted(ALL), scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def encoder(name: str) -> VisionEncoder:
    return build(name)


def test_spec_is_complete_and_immutable(encoder: VisionEncoder) -> None:
    spec = encoder.spec
    assert spec.objective in OBJECTIVES
    assert len(spec.mean) == len(spec.std) == spec.channels
    assert spec.needs_baseline_flag == (spec.family.startswith(("siglip", "clip")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.hidden_size = 1  # type: ignore[misc]


@torch.no_grad()
def test_features_have_the_declared_shape(encoder: VisionEncoder) -> None:
    _, patches, grids = images_for(encoder)
    features = encoder(patches, grids)
    assert features.shape == (sum(h * w for h, w in GRIDS), encoder.spec.hidden_size)
    assert features.isfinite().all()


@torch.no_grad()
def test_one_image_alone_equals_itself_in_a_batch(encoder: VisionEncoder) -> None:
    _, patches, grids = images_for(encoder)
    together = encoder(patches, grids)
    start = 0
    for index, (h, w) in enumerate(GRIDS):
        part = slice(start, start + h * w)
        torch.testing.assert_close(encoder(patches[part], grids[index : index + 1]), together[part], atol=1e-6, rtol=0)
        start += h * w


@torch.no_grad()
def test_images_do_not_see_each_other(encoder: VisionEncoder) -> None:
    _, patches, grids = images_for(encoder)
    before = encoder(patches, grids)
    changed = patches.clone()
    changed[:6] += 1.0
    after = encoder(changed, grids)
    assert torch.equal(before[6:], after[6:])
    assert not torch.allclose(before[:6], after[:6])


@torch.no_grad()
def test_each_patch_sees_the_whole_image(encoder: VisionEncoder) -> None:
    _, patches, grids = images_for(encoder, [(3, 4)])
    before = encoder(patches, grids)
    changed = patches.clone()
    changed[-1] += 1.0
    difference = (encoder(changed, grids) - before).abs().amax(dim=1)
    assert (difference > 0).all()  # the first patch notices a change of the last


@torch.no_grad()
def test_positions_matter(encoder: VisionEncoder) -> None:
    exact = copy.deepcopy(encoder).double()
    _, patches, grids = images_for(encoder, [(3, 4)])
    order = torch.randperm(12)
    moved = exact(patches[order].double(), grids)
    # Without positions, moving the patches would only move their features.
    assert (moved - exact(patches.double(), grids)[order]).abs().max() > 1e-8


def test_position_tables_are_not_degenerate(encoder: VisionEncoder) -> None:
    tables = [value for key, value in encoder.state_dict().items() if "position_embedding" in key]
    has_table = encoder.spec.family not in ("unclipped_llm_encoder", "dinov3_vit")
    assert bool(tables) == has_table
    for table in tables:
        assert table.std() > 1e-3
        assert len(table.squeeze(0).unique(dim=0)) == table.squeeze(0).shape[0]


def test_every_parameter_gets_a_gradient(name: str) -> None:
    encoder = build(name).train()
    _, patches, grids = images_for(encoder)
    encoder(patches, grids).square().sum().backward()
    assert [key for key, value in encoder.named_parameters() if value.grad is None] == []


def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    plain, saving = build(name), build(name)
    plain.eval(), saving.train()  # no dropout in these configurations
    if plain.spec.family == "dinov3_vit":
        saving.model.config.pos_embed_rescale = None  # the model's own augmentation is random
    saving.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, patches, grids = images_for(plain, [(2, 3), (2, 3)])
    gradients = []
    for encoder in (plain, saving):
        encoder(patches, grids).square().sum().backward()
        gradients.append({key: value.grad for key, value in encoder.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_chosen_layers_are_concatenated(name: str) -> None:
    encoder, several = build(name), build(name, feature_layers=[-1, 0, 1])
    several.load_state_dict(encoder.state_dict())
    _, patches, grids = images_for(encoder)
    features = several(patches, grids)
    width = encoder.spec.hidden_size
    assert several.spec.hidden_size == 3 * width == features.shape[1]
    single = build(name, feature_layers=[2])
    single.load_state_dict(encoder.state_dict())
    assert torch.equal(features[:, :width], single(patches, grids))  # -1 is the last block


@pytest.mark.parametrize("layers", [[3], [-4], [0, 7], []])
def test_layers_out_of_range_are_named(name: str, layers: list[int]) -> None:
    with pytest.raises(UsageError, match="feature_layers"):
        build(name, feature_layers=layers)


@torch.no_grad()
def test_half_precision_runs(encoder: VisionEncoder) -> None:
    _, patches, grids = images_for(encoder)
    features = copy.deepcopy(encoder).bfloat16()(patches, grids)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), encoder(patches, grids), atol=0.15, rtol=0.1)


@torch.no_grad()
def test_frames_of_a_clip_are_encoded_one_by_one(encoder: VisionEncoder) -> None:
    _, patches, grids = images_for(encoder, [(2, 3), (2, 3)])
    assert torch.equal(encoder(patches, torch.tensor([[2, 2, 3]])), encoder(patches, grids))


@torch.no_grad()
def test_no_images_give_no_features(encoder: VisionEncoder) -> None:
    empty = encoder(torch.zeros(0, encoder.spec.patch_values), torch.zeros(0, 3, dtype=torch.int64))
    assert empty.shape == (0, encoder.spec.hidden_size)


def test_patches_that_do_not_fit_are_refused(encoder: VisionEncoder) -> None:
    values = encoder.spec.patch_values
    with pytest.raises(DataError, match="pixel_values"):
        encoder(torch.zeros(6, values + 1), torch.tensor([[1, 2, 3]]))
    with pytest.raises(DataError, match="asks for 6 patches, pixel_values holds 5"):
        encoder(torch.zeros(5, values), torch.tensor([[1, 2, 3]]))
    with pytest.raises(DataError, match=r"image_grid_thw\[1\]"):
        encoder(torch.zeros(6, values), torch.tensor([[1, 2, 3], [1, 0, 3]]))


@pytest.mark.parametrize("family", sorted(set(VISION) - {"unclipped_llm_encoder"}))
@torch.no_grad()
def test_features_equal_the_transformers_model(family: str) -> None:
    config = VISION[family]()
    torch.manual_seed(0)
    encoder = build_encoder(copy.deepcopy(config), baseline=True).eval()
    if family.startswith("siglip"):
        config.vision_use_head = False
    if family == "vit_mae":
        config.mask_ratio = 0.0
    extra = {"add_pooling_layer": False} if family in ("vit", "ijepa") else {}
    reference = AutoModel.from_config(config, **extra).eval()
    reference.load_state_dict(encoder.model.state_dict())
    planes, patches, grids = images_for(encoder)
    expected = [direct_features(reference, family, plane, encoder.spec.num_prefix_tokens) for plane in planes]
    torch.testing.assert_close(encoder(patches, grids), torch.cat(expected), atol=2e-6, rtol=1e-5)


class Holder(PreTrainedModel):
    """The smallest composite model with a vision encoder inside."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.vision_tower = build_encoder(ALL[config.family](), baseline=True)
        self.post_init()


@torch.no_grad()
def test_a_composite_model_saves_and_loads_it(name: str, tmp_path: Any) -> None:
    holder = Holder(PreTrainedConfig(family=name)).eval()
    holder.save_pretrained(tmp_path)
    loaded, info = Holder.from_pretrained(tmp_path, config=PreTrainedConfig(family=name), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    _, patches, grids = images_for(holder.vision_tower)
    assert torch.equal(loaded.eval().vision_tower(patches, grids), holder.vision_tower(patches, grids))
