"""The published shapes: built without memory, their parameters counted and compared."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from unclipped.core.errors import UsageError
from unclipped.encoders.vit_shapes import SHAPES, named_shape
from unclipped.objectives.trunk import build_trunk

# Billions of parameters as the reports print them, with half a unit of the last printed digit.
PUBLISHED = {
    "webdino-0.3b": (0.304, 0.0005),
    "webdino-1b": (1.135, 0.0015),
    "webdino-2b": (2.08, 0.005),
    "webdino-3b": (2.95, 0.005),
    "webdino-5b": (4.94, 0.005),
    "webdino-7b": (6.45, 0.005),
    "webmae-0.3b": (0.3, 0.05),
    "webmae-0.7b": (0.63, 0.05),
    "webmae-1b": (1.1, 0.05),
    "webmae-2b": (2.1, 0.05),
    "webmae-3b": (2.9, 0.05),
    "tiny": (0.0055, 0.00005),  # ViT-Ti/16 without a head
    "small": (0.0217, 0.00005),  # ViT-S/16
}
HIDDEN = {
    "webdino-0.3b": 2736,
    "webdino-1b": 4096,
    "webdino-2b": 7168,
    "webdino-3b": 8192,
    "webdino-5b": 9560,
    "webdino-7b": 10928,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_published(name: str) -> None:
    fields = named_shape(name)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    with torch.device("meta"):
        model = AutoModel.from_config(config, **options)
    billions, half_digit = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=half_digit)
    if name in HIDDEN:
        widths = {module.in_features for key, module in model.named_modules() if key.endswith("down_proj")}
        assert widths == {HIDDEN[name]}


def test_a_named_shape_builds_a_trunk_and_may_be_changed() -> None:
    trunk = build_trunk({"name": "tiny", "num_hidden_layers": 1}, image_size=32, maskable=True)
    assert (trunk.width, trunk.patch_size) == (192, (16, 16))
    assert trunk.encoder.model.config.num_hidden_layers == 1
    assert trunk(torch.zeros(1, 3, 32, 32)).patches.shape == (1, 4, 192)
    assert SHAPES["tiny"]["num_hidden_layers"] == 12


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": "webdino-1"}, "no shape 'webdino-1'; did you mean 'webdino-1b'"),
        ({"name": "tiny", "model_type": "dinov2"}, "shape.model_type: the shape 'tiny' is a vit"),
    ],
)
def test_bad_names(shape: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_trunk(shape, image_size=None)
