"""Fields that a user gives for a transformers configuration: taken, or refused in one line before a model is built."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclipped.core.errors import UsageError
from unclipped.encoders.given_config import config_from_fields
from unclipped.encoders.llm_encoder import register_llm_encoder

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
register_llm_encoder()

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vit", {"num_hidden_layers": -1}, "shape.num_hidden_layers: expected a whole number from 1 to 1,024, found -1"),
    ("vit", {"num_hidden_layers": 10**9}, "from 1 to 1,024, found 1000000000"),
    ("vit", {"hidden_size": "big"}, "shape.hidden_size: vit takes a whole number, found 'big'"),
    ("vit", {"hidden_size": True}, "found True"),
    (
        "vit",
        {"hidden_size": 33, "num_attention_heads": 4},
        "(33) is no multiple of num_attention_heads (4)",
    ),
    ("vit", {"num_attention_heads": 0}, "found 0"),
    ("vit", {"hidden_size": 12 * 10**7}, "the limit is 1,000,000,000,000"),
    ("vit", {"hidden_size": 120_000, "num_hidden_layers": 1}, "this machine has"),
    ("vit", {"image_size": 10**9}, "from 1 to 20,000"),
    ("vit", {"layer_norm_eps": float("nan")}, "shape.layer_norm_eps: expected a number from 0"),
    ("vit", {"hidden_dropout_prob": 7.0}, "from 0 to 1, found 7.0"),
    ("vit", {"initializer_range": -1.0}, "found -1.0"),
    ("vit", {"hidden_act": "nope"}, "no vit can be built from these fields"),
    ("vit", {"hidden_act": "x" * 5000}, "at most 1,000 characters"),
    ("vit", {"num_labels": 10**9}, "from 0 to 100,000"),
    ("vit", {"hiden_size": 8}, "vit has no such field; did you mean 'hidden_size'"),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads (6) is no multiple"),
    ("qwen3", {"rope_parameters": [1]}, "qwen3 takes a mapping of fields, found a list of 1 entries"),
    ("qwen3", {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "no qwen3 can be built"),
    ("qwen3", {"layer_types": ["x"] * 10**5}, "at most 10,000 entries"),
    ("qwen3", {"dtype": "nope"}, "no qwen3 can be built"),
    ("unclipped_llm_encoder", {"text_config": {"hidden_size": -3}}, "shape.text_config.hidden_size: expected a whole"),
    ("unclipped_llm_encoder", {"text_config": {"model_type": ["a"]}}, "shape.text_config.model_type: unknown"),
    ("unclipped_llm_encoder", {"text_config": 7}, "takes a mapping of fields, found 7"),
    ("unclipped_llm_encoder", {"text_config": {"model_type": "gpt2"}}, "cannot become a vision encoder"),
    ("unclipped_llm_encoder", {"rope_form": "spiral"}, "unknown rope_form"),
]


@pytest.mark.parametrize(("model_type", "fields", "says"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_shape_that_no_model_has_is_one_line(model_type: str, fields: dict[str, Any], says: str, capfd: Any) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        config_from_fields(model_type, fields, "shape")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("model_type", [["x"], {"a": 1}, None, 7, "nope", "x" * 10**5])
def test_a_model_type_that_there_is_not_is_one_line(model_type: Any) -> None:
    with pytest.raises(UsageError, match=r"shape\.model_type: unknown") as caught:
        config_from_fields(model_type, {}, "shape")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("model_type", ["vit", "vit_mae", "dinov2", "dinov2_with_registers", "qwen3", "gemma3_text"])
def test_shapes_that_models_have_are_taken(model_type: str) -> None:
    fields = {name: value for name, value in SMALL.items() if "dinov2" not in model_type or name != "intermediate_size"}
    fields |= {"num_key_value_heads": 1} if model_type in ("qwen3", "gemma3_text") else {}
    config: Any = config_from_fields(model_type, fields, "shape")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (model_type, 8, 1)


NAMES = st.sampled_from(
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps",
     "hidden_act", "qkv_bias", "num_channels", "intermediate_size", "hidden_dropout_prob", "id2label", "dtype", "x"]
)  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 64), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-1, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(fields=st.dictionaries(NAMES, VALUES, max_size=2))
def test_any_fields_give_a_configuration_or_one_line(fields: dict[str, Any]) -> None:
    try:
        line = config_from_fields("vit", {**SMALL, "image_size": 16, "patch_size": 8, **fields}, "shape").model_type
    except UsageError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 2000
