"""Prompts that come in chunks, and queries beside a prefill that stay dense: decoded and proposed tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache

from attention.cases import STATIC, layouts
from attention.test_prefill import BLOCKS, IMAGE, assembled_model, text_inputs, text_model, vision_model
from unclipped.attention.calibration import Calibration
from unclipped.attention.layout import Layout
from unclipped.attention.plan import build_plan
from unclipped.attention.prefill import sparse_prefill
from unclipped.attention.syntax import parse_pattern
from unclipped.core.errors import UsageError

assert assembled_model  # a fixture


@settings(max_examples=80, deadline=None)
@given(layout=layouts(), text=st.sampled_from(STATIC), data=st.data())
def test_a_chunk_is_given_the_keys_of_the_whole_row(layout: Layout, text: str, data: st.DataObject) -> None:
    stop = data.draw(st.integers(1, layout.length))
    offset = data.draw(st.integers(0, stop - 1))
    blocks: dict[str, int] = {"key_block": 4, "query_block": 8}
    whole = build_plan(parse_pattern(text), layout, **blocks).element_mask()
    chunk = build_plan(parse_pattern(text), layout, **blocks, offset=offset, stop=stop)
    assert torch.equal(chunk.element_mask(), whole[:, offset:stop, :stop])
    pairs = float((torch.as_tensor(layout.reach[offset:stop]).clamp(max=stop - 1) + 1).sum())
    assert chunk.density == pytest.approx(float(chunk.element_mask().sum(dim=(1, 2)).double().mean()) / pairs)


def logits_in_chunks(model: Any, inputs: dict[str, Tensor], sizes: list[int], cache: Any = None) -> Tensor:
    """Logits of all tokens, (B, T, vocabulary), of forwards over chunks of these sizes behind each other."""
    pieces, place = [], 0
    for size in sizes:
        stop = place + size
        output = model(
            input_ids=inputs["input_ids"][:, place:stop],
            attention_mask=inputs["attention_mask"][:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache, place = output.past_key_values, stop
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("pattern", ["sink(8) + window(12)", "per_layer(full | window(8))"])
@pytest.mark.parametrize("sizes", [[48, 42], [16, 32, 42]])
def test_chunks_by_hand_equal_the_whole(sizes: list[int], pattern: str, is_static: bool) -> None:
    model, inputs = text_model("qwen3"), text_inputs()
    real = inputs["attention_mask"].bool()
    with sparse_prefill(model, pattern, fallback="never", **BLOCKS) as sparse, torch.no_grad():
        whole = model(**inputs).logits
        cache = StaticCache(config=model.config, max_cache_len=100) if is_static else None
        chunks = logits_in_chunks(model, inputs, sizes, cache)
        assert sparse.report()[1].mode == "sparse"
        assert sparse.report()[1].density < 0.6
    assert torch.allclose(chunks[real], whole[real], atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 32])
@pytest.mark.parametrize("cache", [None, "static"])
def test_chunked_generation_equals_whole_generation(cache: str | None, chunk: int) -> None:
    """Chunks of any size, since `generate` knows the whole prompt."""
    model, inputs = text_model("qwen3"), text_inputs(60)
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    with sparse_prefill(model, "sink(4) + window(6)", fallback="never", **BLOCKS) as sparse:
        expected = model.generate(**arguments)
        assert sparse.report()[0].density < 0.8
        assert torch.equal(model.generate(**arguments, prefill_chunk_size=chunk), expected)
        assert torch.equal(model.generate(**arguments, num_return_sequences=2, num_beams=2)[::2, :60],
                           inputs["input_ids"])  # fmt: skip
    dense = model.generate(**arguments)
    assert not torch.equal(dense, expected)


def test_chunks_of_an_image_are_its_part_of_the_whole() -> None:
    """A chunk may begin and end inside an image, whose grid is known from the first."""
    model, inputs = vision_model("qwen2_5_vl")
    ids, embeddings = inputs["input_ids"], {}
    layout = Layout.from_token_types((ids[0] == IMAGE).int(), [(1, 8, 8)])
    pattern = "global_text + sink(8) + window2d(1, 8)"
    text = model.model.language_model

    def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings.update(kwargs)

    handle = text.register_forward_pre_hook(capture, with_kwargs=True)
    with sparse_prefill(model, pattern, fallback="never", **BLOCKS), torch.no_grad():
        whole = model(**inputs).logits
    handle.remove()
    states, positions = embeddings["inputs_embeds"], embeddings["position_ids"]
    with sparse_prefill(model, pattern, fallback="never", layouts=[layout], **BLOCKS) as sparse, torch.no_grad():
        cache, pieces = None, []
        for start, stop in ((0, 41), (41, 70), (70, 95)):
            output = model(
                inputs_embeds=states[:, start:stop], position_ids=positions[..., start:stop], past_key_values=cache,
                attention_mask=torch.ones(1, stop, dtype=torch.int64), use_cache=True,
            )  # fmt: skip
            cache = output.past_key_values
            pieces.append(output.logits)
            assert sparse.report()[0].mode == "sparse"
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-4)


def test_chunked_generation_of_our_model(assembled_model: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = assembled_model
    one = {key: value[:1] if key in ("input_ids", "attention_mask") else value for key, value in inputs.items()}
    with torch.no_grad():
        images = model.get_image_features(one["pixel_values"], one["image_grid_thw"])
    arguments: dict[str, Any] = {**one, "max_new_tokens": 6, "do_sample": False}
    encoded = {key: value for key, value in arguments.items() if key not in ("pixel_values", "image_grid_thw")}
    with sparse_prefill(model, "sink(8) + window2d(1, 1)", fallback="never", **BLOCKS) as sparse:
        expected = model.generate(**arguments)
        chunked = model.generate(**encoded, mm_encoder_outputs={"image": images}, prefill_chunk_size=20)
        assert torch.equal(chunked, expected)
        assert sparse.report()[0].mode == "sparse"
        assert sparse.report()[0].tokens == one["input_ids"].shape[1]


def test_dynamic_patterns_choose_again_in_each_chunk() -> None:
    """The first chunk is as in the whole prompt; later ones are sparse."""
    model, inputs = text_model("qwen3"), text_inputs()
    one = {key: value[:1] for key, value in inputs.items()}
    with sparse_prefill(model, "topk(1)", fallback="never", **BLOCKS) as sparse, torch.no_grad():
        whole = model(**one).logits
        chunks = logits_in_chunks(model, one, [48, 42])
        assert sparse.report()[0].mode == "sparse"
        assert sparse.report()[0].tokens == 90
    assert torch.allclose(chunks[:, :48], whole[:, :48], atol=1e-4)


def test_short_continuations_are_dense_and_say_why() -> None:
    model, inputs = text_model("qwen3"), text_inputs()
    one = {key: value[:1] for key, value in inputs.items()}
    with sparse_prefill(model, "window(8)", fallback="never", **BLOCKS) as sparse, torch.no_grad():
        logits_in_chunks(model, one, [85, 5])
        assert "continues a cache with few tokens" in str(sparse.report()[0].reason)


def test_a_second_turn_sees_the_first() -> None:
    """Behind decode steps: their tokens count as text."""
    model, inputs = text_model("qwen3"), text_inputs()
    one = {key: value[:1] for key, value in inputs.items()}
    with sparse_prefill(model, "sink(8) + window(12)", fallback="never", **BLOCKS) as sparse, torch.no_grad():
        whole = model(**one).logits
        turns = logits_in_chunks(model, one, [32, 1, 1, 56])
        assert sparse.report()[0].mode == "sparse"
    assert turns.shape == whole.shape
    assert np.isfinite(turns.numpy()).all()


def test_proposed_tokens_are_decoded() -> None:
    """Assisted decoding runs proposed tokens in one forward with the prompt: they are dense, as in plain decoding."""
    model, inputs = text_model("qwen3"), text_inputs(60)
    one = {key: value[:1] for key, value in inputs.items()}
    draft = text_model("llama")
    arguments: dict[str, Any] = {**one, "max_new_tokens": 12, "do_sample": False}
    with sparse_prefill(model, "sink(4) + window(6)", fallback="never", **BLOCKS) as sparse:
        expected = model.generate(**arguments)
        assert torch.equal(model.generate(**arguments, assistant_model=draft), expected)
        assert torch.equal(model.generate(**arguments, prompt_lookup_num_tokens=3), expected)
        with sparse_prefill(draft, "window(8)", fallback="never", **BLOCKS):
            assert torch.equal(model.generate(**arguments, assistant_model=draft), expected)
        assert sparse.summary() is not None


def test_given_layouts_of_another_length_are_refused() -> None:
    model, inputs = text_model("qwen3"), text_inputs()
    one = {key: value[:1] for key, value in inputs.items()}
    given = [Layout.from_token_types([0] * 80)]
    with sparse_prefill(model, "full", fallback="never", layouts=given, **BLOCKS), torch.no_grad():
        with pytest.raises(UsageError, match="row 0: the layout describes 80 tokens, the batch holds 90"):
            model.generate(**one, max_new_tokens=2)
        with pytest.raises(UsageError, match="row 0: the layout describes 80 tokens, the batch holds 90"):
            model(**one, use_cache=True)


@pytest.mark.parametrize("chunk", [None, 32])
def test_dense_prefills_into_a_static_cache_are_the_models_own(chunk: int | None) -> None:
    """The cache moves its count on while the layers run: the mask of a later layer is still that of the forward."""
    model, inputs = text_model("qwen3"), text_inputs(60)
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**arguments)
    with sparse_prefill(model, "window(8)", **BLOCKS) as sparse:
        assert torch.equal(model.generate(**arguments, prefill_chunk_size=chunk), expected)
        assert sparse.report()[0].reason == "60 tokens are fewer than 1024"


@pytest.mark.parametrize(("densest", "mode"), [(0.8, "sparse"), (0.5, "dense")])
def test_chunks_are_judged_as_the_whole_row(densest: float, mode: str) -> None:
    """Early chunks are denser than the whole, yet all run alike, so that `auto` gives the same answers in chunks."""
    model, inputs = text_model("qwen3"), text_inputs()
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 8, "do_sample": False}
    rule = Calibration((16,), (densest,))
    with sparse_prefill(model, "sink(4) + window(6)", calibration=rule, **BLOCKS) as sparse:
        modes = []
        handle = model.register_forward_hook(lambda *_: modes.append(sparse.report()[0].mode))
        expected = model.generate(**arguments)
        assert torch.equal(model.generate(**arguments, prefill_chunk_size=20), expected)
        handle.remove()
    assert set(modes) == {mode}
