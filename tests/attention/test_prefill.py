"""Sparse prefill on stock transformers models and ours."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, StaticCache

from support.tiny_models import tiny_lm
from unclipped.attention.layout import Layout
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.state import _STATES
from unclipped.core.errors import UsageError

BLOCKS: dict[str, int] = {"key_block": 8, "query_block": 16}
IMAGE = 255
SPARSE = "global_text + sink(8) + topk(1)"


def text_inputs(length: int = 90) -> dict[str, Tensor]:
    """Two rows, the second with padding on the left."""
    ids = torch.randint(5, 250, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text_model(family: str) -> PreTrainedModel:
    if family == "gemma3_text":  # a sliding layer and a full one
        return tiny_lm(None, family, layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=16)
    return tiny_lm(None, family)


def vision_model(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny stock model and a prompt with an image of 64 tokens between text."""
    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 2,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    if family == "llava":
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
        }  # fmt: skip
        config = AutoConfig.for_model(
            "llava", vision_config=vision, text_config={"model_type": "llama", **text}, image_token_id=IMAGE,
            image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="default",
        )  # fmt: skip
        images = {"pixel_values": torch.randn(1, 3, 64, 64, generator=generator)}
    elif family == "smolvlm":
        vision = {
            "model_type": "smolvlm_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 64, "patch_size": 4,
        }  # fmt: skip
        config = AutoConfig.for_model(
            "smolvlm", vision_config=vision, text_config={"model_type": "llama", **text}, image_token_id=IMAGE,
            scale_factor=2, pad_token_id=0,
        )  # fmt: skip
        images = {"pixel_values": torch.randn(1, 1, 3, 64, 64, generator=generator)}
    elif family == "gemma3":  # images see themselves both ways; a sliding layer and a full one
        vision = {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "vision_use_head": False,
        }  # fmt: skip
        sliding = {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 8,
            "query_pre_attn_scalar": 8,
        }  # fmt: skip
        config = AutoConfig.for_model(
            "gemma3", vision_config=vision, text_config={"model_type": "gemma3_text", **text, **sliding},
            image_token_index=IMAGE, image_token_id=IMAGE, mm_tokens_per_image=64,
        )  # fmt: skip
        images = {"pixel_values": torch.randn(1, 3, 64, 64, generator=generator)}
    else:
        config = AutoConfig.for_model(
            "qwen2_5_vl",
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
                "fullatt_block_indexes": [1], "window_size": 112,
            },
            text_config={
                "model_type": "qwen2_5_vl_text", **text,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            image_token_id=IMAGE, video_token_id=254, vision_start_token_id=253, vision_end_token_id=252,
        )  # fmt: skip
        images = {
            "pixel_values": torch.randn(256, 3 * 2 * 14 * 14, generator=generator),
            "image_grid_thw": torch.tensor([[1, 16, 16]]),
        }
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    ids = torch.cat([torch.arange(10, 30), torch.full((64,), IMAGE), torch.arange(30, 41)])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    return model, inputs


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_full_density_generates_the_same_tokens(family: str, cache: str | None) -> None:
    model, inputs = text_model(family), text_inputs()
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(**arguments)
    with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse:
        assert torch.equal(model.generate(**arguments), expected)
        assert sparse.report()[-1].mode == "sparse"
        assert sparse.report()[-1].density == pytest.approx(1.0)
    with sparse_prefill(model, "sink(8) + window(8)", fallback="never", **BLOCKS) as sparse:
        model.generate(**arguments)
        assert sparse.report()[-1].density < 0.6


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_whole_vision_language_models(family: str) -> None:
    model, inputs = vision_model(family)
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**arguments)
    with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse:
        assert torch.equal(model.generate(**arguments), expected)
        assert [record.mode for record in sparse.report()] == ["sparse", "sparse"]
    with sparse_prefill(model, SPARSE, fallback="never", **BLOCKS) as sparse:
        model.generate(**arguments)
        assert all(record.mode == "sparse" and record.density < 1.0 for record in sparse.report())
    with sparse_prefill(model, "global_text + window2d(1, 8)", fallback="never", **BLOCKS) as sparse:
        model(**inputs)  # the grid, 8×8, is known
        assert sparse.report()[0].density < 1.0


def test_images_that_see_themselves_both_ways() -> None:
    """Gemma 3: both layers run sparsely with later tokens of the image, its sliding one inside its window."""
    model, inputs = vision_model("gemma3")
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 8, "do_sample": False}
    expected, logits = model.generate(**arguments), model(**inputs).logits
    with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse, torch.no_grad():
        assert torch.allclose(model(**inputs).logits, logits, atol=1e-4)
        assert torch.equal(model.generate(**arguments), expected)
        window, full = sparse.report()
        assert window.mode == "sparse"
        assert window.density < 0.6
        assert full.mode == "sparse"
        assert full.density == pytest.approx(1.0)
    with sparse_prefill(model, SPARSE, fallback="never", **BLOCKS) as sparse:
        model.generate(**arguments)
        assert sparse.report()[1].density < 1.0
    given = [Layout.from_input_ids(inputs["input_ids"][0], IMAGE, [(1, 8, 8)]).with_sight("images")]
    other, causal = vision_model("llava")
    with (
        sparse_prefill(other, "full", fallback="never", layouts=given, **BLOCKS),
        pytest.raises(UsageError, match="but the model's mask is causal"),
    ):
        other(**causal)


def test_compiled_decode_steps() -> None:
    """A decode step under a pattern is one graph, the same as without, and the prefill stays sparse."""
    model, inputs = text_model("qwen3"), text_inputs(60)
    one = {key: value[:1] for key, value in inputs.items()}

    def decode(step: Callable[..., Any]) -> list[int]:
        cache = StaticCache(config=model.config, max_cache_len=80)
        with torch.no_grad():
            token = model(**one, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1)
            tokens = []
            for _ in range(6):
                tokens.append(int(token))
                token = step(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
        return tokens

    with sparse_prefill(model, "sink(4) + window(6)", fallback="never", **BLOCKS) as sparse:
        expected = decode(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert decode(compiled) == expected
        assert sparse.report()[0].mode == "sparse"


def test_our_model(assembled_model: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = assembled_model
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**arguments)
    with sparse_prefill(model, "full", fallback="never", **BLOCKS) as sparse:
        assert torch.equal(model.generate(**arguments), expected)
        assert all(record.mode == "sparse" for record in sparse.report())
    with sparse_prefill(model, "sink(8) + window2d(1, 1)", fallback="never", **BLOCKS) as sparse:
        model.generate(**arguments)
        assert all(record.density < 1.0 for record in sparse.report())


@pytest.fixture(scope="module")
def assembled_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    """Our model on a batch of two: an image and a question, and text alone, padded on the left."""
    from PIL import Image

    from support.tiny_models import tiny_vlm

    folder = tmp_path_factory.mktemp("sparse")
    model, processor, _ = tiny_vlm(folder, "llm", connector="mlp(2)", output=folder / "model")
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": Image.new("RGB", (96, 80), "red")}, *question("what")],
            }
        ],
        [{"role": "user", "content": question("how many")}],
    ]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True
    )
    return model.eval(), dict(inputs)


def question(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def test_padding_does_not_matter() -> None:
    """The padded row's logits equal those of the row alone."""
    model, inputs = text_model("qwen3"), text_inputs()
    alone = inputs["input_ids"][1:, 23:]
    with sparse_prefill(model, "sink(8) + window(8)", fallback="never", **BLOCKS), torch.no_grad():
        batch = model(**inputs).logits[1, 23:]
        single = model(input_ids=alone).logits[0]
    assert torch.allclose(batch, single, atol=1e-4)


def test_training_under_a_pattern_equals_the_definition() -> None:
    model, ids = text_model("qwen3").train(), text_inputs()["input_ids"]
    gradients = []
    for backend in ("gather", "reference"):
        model.zero_grad()
        with sparse_prefill(model, "window(16)", fallback="never", backend=backend, **BLOCKS):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for own, expected in zip(*gradients, strict=True):
        assert torch.allclose(own, expected, atol=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = text_model("qwen3").train(), text_inputs()["input_ids"]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with sparse_prefill(model, "topk(1)", fallback="never", **BLOCKS) as sparse:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            assert sparse.report()[0].mode == "sparse"
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for own, expected in zip(*gradients, strict=True):
        assert torch.allclose(own, expected, atol=1e-6)


def test_auto_runs_short_prompts_dense_and_says_why() -> None:
    model, inputs = text_model("qwen3"), text_inputs()
    expected = model(**inputs).logits
    with sparse_prefill(model, "window(8)", **BLOCKS):
        assert torch.equal(model(**inputs).logits, expected)
        report = model.sparse_report()
        assert {record.mode for record in report} == {"dense"}
        assert report[0].reason == "90 tokens are fewer than 4096"


def test_a_dropped_model_leaves_nothing_behind() -> None:
    gc.collect()  # what other tests dropped
    before = len(_STATES)
    model = text_model("qwen3")
    sparse_prefill(model, "full")
    assert len(_STATES) == before + 1
    del model
    gc.collect()
    assert len(_STATES) == before


def test_leaving_puts_the_model_back() -> None:
    model, inputs = text_model("qwen3"), text_inputs()
    before, expected = dict(vars(model)), model(**inputs).logits
    with sparse_prefill(model, "window(8)", fallback="never", **BLOCKS):
        assert model.config._attn_implementation == "unclipped_sparse"
    assert model.config._attn_implementation == "sdpa"
    assert vars(model).keys() == before.keys()
    assert not model._forward_pre_hooks
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("pattern", [["full", "window(8)"], "per_layer(full | window(8))"])
def test_a_pattern_for_each_layer(pattern: str | list[str]) -> None:
    model, inputs = text_model("qwen3"), text_inputs()
    with sparse_prefill(model, pattern, fallback="never", **BLOCKS) as sparse:
        model(**inputs)
        summary = sparse.summary()
        assert summary is not None
        assert summary.pattern == "per_layer(full | window(size=8))"
        densities = [record.density for record in sparse.report()]
    assert densities[0] == pytest.approx(1.0)
    assert densities[1] < 0.6


def test_layers_tell_what_their_plans_took() -> None:
    """A static pattern is planned by the first layer that needs it, a dynamic one by each, at every prefill."""
    model, inputs = text_model("qwen3"), text_inputs()
    ticks = iter(range(100))
    for text, taken in (("window(8)", [[2.0, 0.0], [0.0, 0.0]]), ("topk(1)", [[2.0, 2.0], [2.0, 2.0]])):
        with sparse_prefill(model, text, fallback="never", **BLOCKS) as sparse, torch.no_grad():
            sparse.state.clock = lambda: float(next(ticks))
            for expected in taken:
                model(**inputs)
                assert [record.plan_seconds for record in sparse.report()] == expected


def given_layout(model: Any) -> None:
    with sparse_prefill(
        model, "window(8)", fallback="never", layouts=[Layout.from_token_types([0] * 80)] * 2, **BLOCKS
    ):
        model(**text_inputs())


def without_keys(model: Any) -> None:
    with sparse_prefill(model, "window2d(1, 1)", fallback="never", **BLOCKS):
        model(**text_inputs())


def twice(model: Any) -> None:
    with sparse_prefill(model, "full"):
        sparse_prefill(model, "full")


def with_embeddings(model: Any) -> None:
    with sparse_prefill(model, "full", fallback="never", **BLOCKS):
        model(inputs_embeds=torch.zeros(1, 40, 32))


def with_gaps(model: Any) -> None:
    inputs = text_inputs()
    inputs["attention_mask"][0, 40] = 0
    layouts = [Layout.from_token_types([0] * 89), Layout.from_token_types([0] * 67)]
    with sparse_prefill(model, "full", fallback="never", layouts=layouts, **BLOCKS):
        model(**inputs)


def with_weights(model: Any) -> None:
    with sparse_prefill(model, "full", fallback="never", **BLOCKS):
        model(**text_inputs(), output_attentions=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: sparse_prefill(model, "windw(8)"), "did you mean 'window'"),
        (lambda model: sparse_prefill(model, ["full"] * 3), "one for each of the 2 layers, found 3"),
        (
            lambda model: sparse_prefill(model, "per_layer(3*full)"),
            "3 patterns for the model's 2 layers; give at most 2",
        ),
        (lambda model: sparse_prefill(model, "per_head(3*full)"), "3 patterns for the model's 2 key heads"),
        (without_keys, r"pattern window2d\(rows=1, columns=1\): row 0 \(text\) has no key that it may see"),
        (lambda model: sparse_prefill(model, "full", fallback="sometimes"), "expected 'auto' or 'never'"),
        (given_layout, "row 0: the layout describes 80 tokens, the batch holds 90"),
        (twice, "under sparse prefill already"),
        (with_embeddings, "called with inputs_embeds"),
        (with_gaps, "the attention mask has gaps"),
        (with_weights, "output_attentions=True cannot be served"),
    ],
)
def test_bad_use(call: Callable[[Any], None], message: str) -> None:
    model = text_model("qwen3")
    with pytest.raises(UsageError, match=message):
        call(model)
    assert model.config._attn_implementation == "sdpa"


def test_models_with_attention_of_their_own_are_named() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    model = GPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    with pytest.raises(UsageError, match=r"GPTJModel: GPTJAttention computes its attention itself"):
        sparse_prefill(model, "full")


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_dense_fallback_with_padding_behind_equals_the_plain_model(family: str, is_static: bool) -> None:
    model, inputs = text_model(family), text_inputs()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)

    def logits(chunks: int) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=128) if is_static else None
        found, size = [], 90 // chunks
        for first in range(0, 90, size):
            ids, mask = inputs["input_ids"][:, first : first + size], inputs["attention_mask"][:, : first + size]
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        return torch.cat(found, dim=1)[inputs["attention_mask"].bool()]  # (tokens, vocabulary)

    with torch.no_grad():
        expected = logits(1)
        with sparse_prefill(model, "window(4)", calibration="fixed", **BLOCKS) as sparse:
            for chunks in (1, 3):
                torch.testing.assert_close(logits(chunks), expected, atol=1e-5, rtol=1e-4)
            assert {row.mode for row in sparse.report()} == {"dense"}
