"""The image rule: numbers are broadcast, contradictions are refused with the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from unclipped.images.config import ImageRule


def test_one_number_stands_for_both_sides_and_every_channel() -> None:
    rule = ImageRule(rule="squash", size=224, patch_size=14, merge=2, mean=0.4, std=[0.2])
    assert (rule.size, rule.patch_size, rule.merge) == ((224, 224), (14, 14), (2, 2))
    assert rule.mean == (0.4, 0.4, 0.4)
    assert rule.std == (0.2, 0.2, 0.2)
    assert rule.block == (28, 28)
    assert ImageRule(channels=1).mean == (0.5,)
    assert ImageRule(patch_size=(32, 8), channels=1).patch_values == 256


def test_json_round_trip() -> None:
    rule = ImageRule(patch_size=(32, 8), merge=(1, 2), max_tokens=77, mean=(0.1, 0.2, 0.3), background=(1, 2, 3))
    assert ImageRule(**rule.model_dump(mode="json")) == rule
    assert ImageRule.model_validate_json(rule.model_dump_json()) == rule


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"rule": "native", "size": 224}, "native has no size"),
        ({"rule": "squash"}, "needs a size"),
        ({"rule": "squash", "size": 100, "patch_size": 16}, "choose (96, 96)"),
        ({"rule": "squash", "size": 48, "patch_size": 16, "merge": 2}, "no multiple"),
        ({"rule": "squash", "size": 32, "fixed_height": 32}, "belong to rule native"),
        ({"rule": "pad", "size": 32, "shorter_side": 32}, "belongs to rule crop"),
        ({"rule": "crop", "size": 224, "shorter_side": 200}, "smaller than size"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 is more"),
        ({"max_tokens": 0}, "greater than 0"),
        ({"patch_size": (16, 0)}, "greater than 0"),
        ({"patch_size": (16, 8), "native_variant": "qwen2_vl"}, "square blocks"),
        ({"fixed_height": 30}, "no multiple of the block height 16"),
        ({"fixed_height": 64, "max_tokens": 3}, "more rows of tokens"),
        ({"fixed_height": 32, "native_variant": "siglip2"}, "area only"),
        ({"native_variant": "siglip2", "min_tokens": 2}, "always fills the budget"),
        ({"mean": (0.5, 0.4)}, "mean needs 3 numbers"),
        ({"mean": None}, "mean"),
        ({"std": 0}, "std must be positive"),
        ({"background": (0, 0, 256)}, "less than or equal to 255"),
        ({"patchsize": 16}, "patchsize"),
    ],
)
def test_contradictions_are_refused(fields: dict, part: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ImageRule(**fields)
    assert part in str(caught.value)


def test_config_loads_no_torch() -> None:
    code = "import sys; import unclipped.images.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
