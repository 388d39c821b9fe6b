"""Batches: padding is invisible, and a row of questions about one image trains as the questions alone would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_models import tiny_image, tiny_lm, tiny_tokenizer, tiny_vlm
from unclipped.data.sample import ImagePart, Sample, SampleGroup
from unclipped.encoding.chat import IGNORED
from unclipped.encoding.collate import Collator, collate_prompts, shared_image_mask
from unclipped.encoding.examples import encode, encode_group, encode_prompt, encode_sample

PAIRS = [("how many red", "2"), ("what is this word", "red circle"), ("how many", "3 3")]


def samples_of(images: list[ImagePart]) -> tuple[Sample, ...]:
    return tuple(Sample.qa(f"q{number}", images, *pair) for number, pair in enumerate(PAIRS))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "sample_ids"}


def test_right_padding_shapes_and_names() -> None:
    tokenizer = tiny_tokenizer()
    examples = [encode_sample(sample, tokenizer) for sample in samples_of([])]
    batch = Collator.for_processor(tokenizer, pad_to_multiple=8)(examples)
    length = batch["input_ids"].shape[1]
    assert length % 8 == 0
    assert batch["sample_ids"] == ["q0", "q1", "q2"]
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "labels", "sample_ids"}
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        assert batch["input_ids"][row, :size].tolist() == example.input_ids
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (length - size)
        assert batch["labels"][row, size:].eq(IGNORED).all()
        assert batch["input_ids"][row, size:].eq(tokenizer.pad_token_id).all()


def test_prompts_are_padded_on_the_left() -> None:
    tokenizer = tiny_tokenizer()
    examples = [encode_prompt(sample, tokenizer) for sample in samples_of([])]
    batch = collate_prompts(examples, tokenizer)
    for row, example in enumerate(examples):
        assert batch["input_ids"][row, -len(example.input_ids) :].tolist() == example.input_ids
        assert batch["attention_mask"][row].sum() == len(example.input_ids)
        assert batch["attention_mask"][row, -1] == 1


def test_patches_and_grids_of_a_batch_come_in_the_order_of_its_rows(tmp_path: Path) -> None:
    _, processor, _ = tiny_vlm(tmp_path)
    sizes = [(16, 24), (32, 16), (24, 40)]
    images = [ImagePart(tiny_image(*size, offset=number), name="image") for number, size in enumerate(sizes)]
    samples = [Sample.qa(f"q{number}", [image], *PAIRS[number]) for number, image in enumerate(images)]
    examples = [encode(sample, processor) for sample in samples]
    batch = Collator.for_processor(processor)(examples)
    alone = [Collator.for_processor(processor)([example]) for example in examples]
    assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
    assert torch.equal(batch["image_grid_thw"], torch.cat([one["image_grid_thw"] for one in alone]))
    assert len({tuple(row) for row in batch["image_grid_thw"].tolist()}) == len(sizes)
    prompts = collate_prompts([encode_prompt(sample, processor) for sample in samples], processor)
    assert torch.equal(prompts["pixel_values"], batch["pixel_values"])


def test_who_sees_whom() -> None:
    valid = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    mask = shared_image_mask([[0, 0, 1, 2, 2], None], valid)[:, 0].int()
    assert mask[0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert mask[1].tolist()[2] == [1, 1, 1, 0, 0, 0]
    assert mask[1].tolist()[4] == [0, 0, 0, 0, 1, 0]


def test_text_in_one_row_trains_as_text_apart() -> None:
    """Loss and gradients of a shared row equal those of its samples in rows of their own.

    Model in float64; the library's loss itself takes logits to float32, hence the bounds.
    """
    tokenizer = tiny_tokenizer()
    model = tiny_lm(tokenizer=tokenizer).double()
    samples = samples_of([])
    collator = Collator.for_processor(tokenizer)
    packed = collator([encode_group(SampleGroup(samples), tokenizer), encode_sample(samples[1], tokenizer)])
    apart = collator([encode_sample(sample, tokenizer) for sample in (*samples, samples[1])])
    assert packed["attention_mask"].dtype == torch.bool
    results = [model(**inputs(batch)).loss for batch in (packed, apart)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-6)
    for one, other in zip(*(gradients(model, loss).values() for loss in results), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_questions_in_one_row_cannot_see_each_other() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_lm(tokenizer=tokenizer)
    first, second, third = samples_of([])
    changed = Sample.qa("q1", [], second.question, "blue square")
    collator = Collator.for_processor(tokenizer)
    rows = [encode_group(SampleGroup((first, middle, third)), tokenizer) for middle in (second, changed)]
    with torch.no_grad():
        logits = [model(**inputs(collator([row]))).logits[0] for row in rows]
    for segment in (0, 1, 3):
        places = [[k for k, s in enumerate(row.segments or []) if s == segment] for row in rows]
        torch.testing.assert_close(logits[0][places[0]], logits[1][places[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_image_in_one_row_trains_as_the_image_in_each(tmp_path: Path, attention: str) -> None:
    model, processor, _ = tiny_vlm(tmp_path)
    model = model.double()
    model.set_attn_implementation(attention)
    samples = samples_of([ImagePart(tiny_image(16, 24), "picture")])
    collator = Collator.for_processor(processor)
    packed = collator([encode(SampleGroup(samples), processor)])
    apart = collator([encode_sample(sample, processor) for sample in samples])
    assert packed["image_grid_thw"].shape == (1, 3)
    assert apart["image_grid_thw"].shape == (3, 3)
    results = []
    for batch in (packed, apart):
        given = inputs(batch)
        given["pixel_values"] = given["pixel_values"].double()
        results.append(model(**given).loss)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-6)
    for one, other in zip(*(gradients(model, loss).values() for loss in results), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_mixed_batches_keep_images_in_order(tmp_path: Path) -> None:
    _, processor, _ = tiny_vlm(tmp_path)
    samples = [
        Sample.qa("a", [tiny_image(16, 8)], "what", "red"),
        Sample.qa("b", [], "what", "red"),
        Sample.qa("c", [tiny_image(8, 8), tiny_image(8, 24)], "what", "red"),
    ]
    batch = Collator.for_processor(processor)([encode_sample(sample, processor) for sample in samples])
    assert batch["image_grid_thw"].tolist() == [[1, 2, 1], [1, 1, 1], [1, 1, 3]]
    assert batch["pixel_values"].shape[0] == 6
