"""The processor: expansion, saved form, truncation, and counts that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.prompts import ask, batch
from support.tiny_models import tiny_image
from unclipped.core.errors import DataError, UsageError
from unclipped.models.assemble import set_pixel_statistics
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
