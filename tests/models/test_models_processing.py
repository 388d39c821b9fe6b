"""The processor: expansion, saved form, truncation, and counts that do not fit."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError

from support.prompts import ask, batch
from support.tiny_models import tiny_image
from unclipped.core.errors import DataError, UsageError
from unclipped.models.assemble import set_pixel_statistics
from unclipped.models.chat import _NOTHING_ELSE, COMPACT_TEMPLATE, default_template
from unclipped.models.processing import UnclippedProcessor


def test_expansion_follows_the_connector(assembled: Any) -> None:
    processor = assembled.processor
    inputs = batch(processor, ask("what", (16, 32), (24, 16)))
    assert processor.num_image_tokens(inputs["image_grid_thw"]) == [4, 3]
    counts = assembled.model.model.connector.num_tokens(inputs["image_grid_thw"])
    assert counts.tolist() == processor.num_image_tokens(inputs["image_grid_thw"].tolist())
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == "<|user|>" + "<|image|>" * 7 + "what<|assistant|>"


def test_saved_and_loaded_it_is_the_same(assembled: Any, tmp_path: Any) -> None:
    assembled.processor.save_pretrained(tmp_path)
    again = UnclippedProcessor.from_pretrained(tmp_path)
    assert again.connector == assembled.processor.connector == "average(1x2) + mlp(2)"
    assert again.image_token == assembled.processor.image_token
    assert again.chat_template == again.tokenizer.chat_template == assembled.processor.chat_template
    assert again.image_processor.image_rule == assembled.processor.image_processor.image_rule
    for key, value in batch(again, ask("what", (30, 50))).items():
        assert torch.equal(value, batch(assembled.processor, ask("what", (30, 50)))[key])


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<|image|> a", "b <|image|><|image|>"], [[0], [0]], r"sample 1: 2 image tokens .* found 1 images"),
        (["<|image|> a", "b"], [[0], [0]], r"sample 1: 0 image tokens .* found 1 images"),
        (["<|image|><|image|>"], [0], r"sample 0: 2 image tokens .* found 1 images"),
        (["<|image|>"], None, r"sample 0: 1 image tokens .* found 0 images"),
        (["a", "<|image|>"], [0, 0], r"2 samples hold 1 image tokens .* found 2 images"),
    ],
)
def test_placeholders_and_images_must_fit(assembled: Any, texts: list[str], images: Any, message: str) -> None:
    def real(entry: Any) -> Any:
        return [real(part) for part in entry] if isinstance(entry, list) else tiny_image(16, 16)

    with pytest.raises(DataError, match=message):
        assembled.processor(text=texts, images=None if images is None else real(images))


def test_flat_images_go_to_the_samples_in_order(assembled: Any) -> None:
    images = [tiny_image(16, 32), tiny_image(16, 16)]
    flat = assembled.processor(text=["<|image|> a", "<|image|>"], images=images, padding=True, return_tensors="pt")
    nested = assembled.processor(
        text=["<|image|> a", "<|image|>"], images=[[image] for image in images], padding=True, return_tensors="pt"
    )
    assert all(torch.equal(flat[key], nested[key]) for key in flat)


def test_truncation_inside_an_image_is_refused(assembled: Any) -> None:
    with pytest.raises(DataError, match=r"sample 0: 4 visual tokens in the text, .* left after tokenising"):
        assembled.processor(text=["<|image|> a"], images=[tiny_image(16, 32)], truncation=True, max_length=3)


def test_text_alone(assembled: Any) -> None:
    inputs = batch(assembled.processor, ask("how many"))
    assert "pixel_values" not in inputs


def test_pixel_statistics_can_be_set(assembled: Any, tmp_path: Any) -> None:
    assembled.processor.save_pretrained(tmp_path)
    processor = UnclippedProcessor.from_pretrained(tmp_path)
    set_pixel_statistics(processor, mean=[0.8, 0.8, 0.8], std=[0.2, 0.2, 0.2])
    before = batch(assembled.processor, ask("what", (16, 16)))["pixel_values"]
    after = batch(processor, ask("what", (16, 16)))["pixel_values"]
    torch.testing.assert_close(after, ((before * 0.5 + 0.5) - 0.8) / 0.2, atol=1e-5, rtol=1e-5)
    processor.save_pretrained(tmp_path / "again")
    assert UnclippedProcessor.from_pretrained(tmp_path / "again").image_processor.mean == (0.8, 0.8, 0.8)


def test_an_image_token_that_is_no_single_id_is_refused(assembled: Any) -> None:
    with pytest.raises(UsageError, match="not one id"):
        UnclippedProcessor(assembled.processor.image_processor, assembled.processor.tokenizer, image_token="<picture>")


def test_streamed_text_comes_back(assembled: Any) -> None:
    ids = torch.tensor([assembled.processor.tokenizer.encode("a red circle<|end|>")])
    assert assembled.processor.post_process_image_text_to_text(ids) == ["a red circle"]


def _encoded(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_base64_image_part_is_decoded(assembled: Any) -> None:
    given, pixels = ask("what", (16, 16)), ask("what", (16, 16))[0]["content"][0]["image"]
    for source in ({"base64": _encoded(pixels)}, {"image": None, "url": None, "base64": _encoded(pixels)}):
        encoded = [{"role": "user", "content": [{"type": "image", **source}, given[0]["content"][1]]}]
        for key, value in batch(assembled.processor, given).items():
            assert torch.equal(value, batch(assembled.processor, encoded)[key])


@pytest.mark.parametrize("data", ["this is no base64 " * 9, "secret", 7])
def test_bad_base64_is_one_line_without_the_data(assembled: Any, data: Any) -> None:
    wrong = [{"role": "user", "content": ["what", {"type": "image", "base64": data}]}]
    with pytest.raises(UsageError, match="message 0, part 1: 'base64' is not valid base64") as found:
        batch(assembled.processor, wrong)
    assert str(data) not in str(found.value)


TALK = [{"role": "user", "content": "what"}]


@pytest.fixture(params=["compact", "default", "an older compact one", "an older default one"])
def processor(request: Any, assembled: Any, tmp_path: Any) -> Any:
    """The processor with each template that knows neither tools nor documents."""
    assembled.processor.save_pretrained(tmp_path)
    processor = UnclippedProcessor.from_pretrained(tmp_path)
    if "default" in request.param:
        processor.chat_template = default_template(processor.image_token, eos_token="<|end|>")
    if "older" in request.param:
        assert _NOTHING_ELSE in processor.chat_template
        processor.chat_template = processor.chat_template.replace(_NOTHING_ELSE, "")
    return processor


@pytest.mark.parametrize(
    ("messages", "options", "name"),
    [
        (TALK, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (TALK, {"documents": [{"title": "a", "text": "b"}]}, "documents"),
        ([*TALK, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}], {}, "tool_calls"),
        ([*TALK, {"role": "assistant", "content": "x", "reasoning_content": "because"}], {}, "reasoning_content"),
        ([*TALK, {"role": "tool", "content": "x"}], {}, "unknown role tool"),
        ([{"role": "user"}], {}, "message 0: no content"),
    ],
)
def test_what_the_template_does_not_read_is_refused_by_name(
    processor: Any, messages: Any, options: Any, name: str
) -> None:
    with pytest.raises(UsageError, match=name):
        processor.apply_chat_template(messages, tokenize=False, **options)
    with pytest.raises(UsageError, match=name):
        processor.apply_chat_template([TALK, messages], tokenize=False, **options)


def test_empty_fields_are_no_fields(processor: Any) -> None:
    empty = [{**TALK[0], "tool_calls": None, "reasoning_content": ""}]
    rendered = processor.apply_chat_template(TALK, tokenize=False)
    assert processor.apply_chat_template(empty, tokenize=False, tools=None, documents=[]) == rendered


@pytest.mark.parametrize("template", [COMPACT_TEMPLATE, default_template("<|image|>", eos_token="<|end|>")])
def test_the_tokenizer_alone_refuses_tools(assembled: Any, template: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(TemplateError, match="reads no tools"):
        assembled.processor.tokenizer.apply_chat_template(TALK, chat_template=template, tools=tools, tokenize=False)
    calls = [{**TALK[0], "tool_calls": [{"function": {"name": "f"}}]}]
    with pytest.raises(TemplateError, match="leave tool_calls out"):
        assembled.processor.tokenizer.apply_chat_template(calls, chat_template=template, tokenize=False)


def test_a_template_that_reads_tools_gets_them(assembled: Any) -> None:
    template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert assembled.processor.apply_chat_template(TALK, template, tokenize=False, tools=tools) == "fwhat"
