"""What every pretraining of an encoder begins with: one side of the images, the same for each objective."""

from __future__ import annotations

from typing import Any

import pytest

from unclipped.core.errors import UsageError
from unclipped.training.config import PretrainConfig
from unclipped.training.fresh_trunk import fresh_trunk

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLM = {
    "model_type": "unclipped_llm_encoder",
    "patch_size": 8,
    "text_config": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip


def config(shape: dict[str, Any], image_size: int | None = None) -> PretrainConfig:
    data: Any = {"sources": [{"source": "generated:shapes", "limit": 2}]}
    return PretrainConfig(objective="dinov2", shape=shape, image_size=image_size, data=data, steps=2)


@pytest.mark.parametrize(
    ("shape", "image_size", "side"),
    [
        (TINY, None, 96),
        (TINY | {"image_size": 48}, None, 48),
        (TINY | {"image_size": 48}, 60, 60),
        (TINY | {"name": "small"}, None, 224),
        (TINY | {"name": "small"}, 112, 112),
        (LLM, None, 96),
        (LLM, 40, 40),
    ],
    ids=["ours", "shape", "recipe before shape", "named", "recipe before named", "no table", "no table, recipe"],
)
def test_the_side_is_that_of_the_recipe_then_of_the_shape(
    shape: dict[str, Any], image_size: int | None, side: int
) -> None:
    trunk, found = fresh_trunk(config(shape, image_size))
    assert found == side
    assert trunk.encoder.spec.image_size in (None, (side, side))


def test_a_side_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(UsageError, match=r"image_size: 44 px are no multiple of the patch of 8×8 px"):
        fresh_trunk(config(LLM, 44))
