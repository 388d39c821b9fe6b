"""The forward pass: the language model untouched, images where they belong, loss and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.prompts import ask, batch
from support.tiny_models import tiny_lm, tiny_tokenizer, tiny_vlm
from unclipped.core.errors import DataError, UsageError
from unclipped.models.placing import check_placeholders, usable_mask

FAMILIES = [
    "qwen3",
    "qwen2",
    "llama",
    "mistral",
    "smollm3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "cohere",
    "gpt2",
    "phi",
]
QUIRKS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 4.0},
    "cohere": {"logit_scale": 0.25},
    "qwen3": {"tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False},  # its output layer has a bias
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new_token", [False, True], ids=["token known", "token added"])
def test_without_images_it_is_the_language_model(family: str, new_token: bool, tmp_path: Any) -> None:
    tokenizer = tiny_tokenizer(compact=not new_token)
    vision = "llm" if family in ("qwen3", "gemma2", "gemma3_text") else "dinov2"
    model, _, report = tiny_vlm(
        tmp_path, vision, family=family, tokenizer=tokenizer, output=tmp_path / "out", lm_overrides=QUIRKS.get(family)
    )
    assert report.tokens_added == int(new_token)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    ids = torch.randint(6, lm.config.vocab_size, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    from unclipped.models.checkpoint import load_model

    again, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        expected = lm(input_ids=ids, attention_mask=mask).logits
        for candidate in (model, again):
            found = candidate(input_ids=ids, attention_mask=mask).logits[..., : lm.config.vocab_size]
            assert torch.equal(found, expected)
    text = {
        name: tensor for name, tensor in lm.base_model.state_dict().items() if "embed" not in name and "wte" not in name
    }
    ours = again.model.language_model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in text.items())


def test_a_scaling_embedding_does_not_scale_images(tmp_path: Any) -> None:
    """Gemma multiplies token embeddings by the root of the width; visual tokens reach the first layer as they are."""
    model, processor, _ = tiny_vlm(tmp_path, "llm", family="gemma2")
    inputs = batch(processor, ask("what", (16, 16)))
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        output = model(**inputs)
    handle.remove()
    mask = inputs["input_ids"] == processor.image_token_id
    assert torch.equal(seen[0][mask], output.image_hidden_states)
    tokens = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(seen[0][~mask], tokens[~mask])


def test_images_land_in_their_places(assembled: Any) -> None:
    """The k-th run of placeholders gets the k-th image: changing one changes only its own tokens."""
    model, processor = assembled.model, assembled.processor
    inputs = batch(processor, ask("a", (16, 32), (24, 16)), ask("b"), ask("c", (16, 16)))
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    first = int(inputs["image_grid_thw"][0].prod())
    second = int(inputs["image_grid_thw"][1].prod())
    changed["pixel_values"][first : first + second] += 1.0
    with torch.no_grad():
        before, after = model(**inputs), model(**changed)
    moved = (before.image_hidden_states != after.image_hidden_states).any(dim=1)
    assert moved.tolist() == [False] * 4 + [True] * 3 + [False] * 2
    rows = (before.logits != after.logits).any(dim=-1)
    start = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0]) + 4
    assert rows[0].nonzero()[0].item() == start
    assert not rows[1:].any()


def test_a_batch_equals_its_rows(assembled: Any) -> None:
    model, processor = assembled.model, assembled.processor
    conversations = [ask("what", (16, 32), (24, 16)), ask("how many"), ask("red", (40, 16))]
    for side in ("left", "right"):
        together = batch(processor, *conversations, side=side)
        with torch.no_grad():
            logits = model(**together).logits
            for row, conversation in enumerate(conversations):
                alone = batch(processor, conversation)
                kept = together["attention_mask"][row].bool()
                torch.testing.assert_close(logits[row][kept], model(**alone).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("placeholders", "images", "message"),
    [
        ([4, 3], [3, 4], r"row 0: found 4 image placeholders, but the next images give 7 visual tokens \(3, 4\)"),
        ([4, 5], [4, 4], r"row 1: found 5 image placeholders, but the next images give 4 visual tokens \(4\)"),
        ([4, 4], [4], r"row 1: found 4 .* 0 visual tokens \(none left\)"),
        ([4, 0], [4, 4], r"1 of 2 images have no placeholders"),
    ],
)
def test_counts_are_checked_a_row(placeholders: list[int], images: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_placeholders(placeholders, images)


def test_equal_sums_do_not_hide_a_wrong_row(assembled: Any) -> None:
    """Two rows whose counts are swapped have the right total; each row is wrong all the same, and is named."""
    processor = assembled.processor
    inputs = batch(processor, ask("a", (16, 32)), ask("b", (24, 16)))
    inputs["image_grid_thw"] = inputs["image_grid_thw"].flip(0)
    with pytest.raises(DataError, match=r"sample receipt-7 \(row 0\): found 4 .* give 7"):
        assembled.model(**inputs, sample_ids=["receipt-7", "receipt-8"])
    assert check_placeholders([7, 0, 2], [4, 3, 2]) == [2, 0, 1]


def test_wrong_calls_are_refused(assembled: Any) -> None:
    model = assembled.model
    inputs = batch(assembled.processor, ask("a", (16, 16)))
    with pytest.raises(UsageError, match="exactly one of input_ids"):
        model(pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    with pytest.raises(DataError, match="without image_grid_thw"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(UsageError, match="not both"):
        model(
            **inputs,
            mm_encoder_outputs={"image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])},
        )


def _labelled(processor: Any) -> dict[str, Any]:
    inputs = batch(processor, ask("what", (16, 32)), ask("how many"), ask("red", (24, 16), (16, 16)), side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:] = inputs["input_ids"][0, -3:]
    labels[1, 2:4] = inputs["input_ids"][1, 2:4]
    labels[2, -1] = inputs["input_ids"][2, -1]
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("items", [None, 11], ids=["mean", "num_items_in_batch"])
def test_supervised_only_gives_the_same_loss_and_gradients(tmp_path: Any, items: int | None) -> None:
    model, processor, _ = tiny_vlm(tmp_path, "llm", family="gemma2")
    inputs = _labelled(processor)
    full = model(**inputs, num_items_in_batch=items)
    full.loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    short = model(**inputs, num_items_in_batch=items, supervised_only=True)
    short.loss.backward()
    assert abs(full.loss.item() - short.loss.item()) < 1e-6
    wanted = inputs["labels"][:, 1:] != -100
    assert short.logits.shape == (int(wanted.sum()), full.logits.shape[-1])
    torch.testing.assert_close(short.logits, full.logits[:, :-1][wanted], atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_the_output_layer_runs_at_supervised_places_only(assembled: Any) -> None:
    inputs = _labelled(assembled.processor)
    rows: list[int] = []
    handle = assembled.model.lm_head.register_forward_hook(
        lambda _, args, __: rows.append(args[0].numel() // args[0].shape[-1])
    )
    try:
        assembled.model(**inputs, supervised_only=True)
    finally:
        handle.remove()
    assert rows == [int((inputs["labels"][:, 1:] != -100).sum())]


def test_a_placeholder_is_never_supervised(assembled: Any) -> None:
    inputs = _labelled(assembled.processor)
    everywhere = {**inputs, "labels": inputs["input_ids"].clone()}
    masked = {
        **inputs,
        "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == assembled.processor.image_token_id, -100),
    }
    with torch.no_grad():
        assert torch.equal(assembled.model(**everywhere).loss, assembled.model(**masked).loss)


def test_logits_to_keep(assembled: Any) -> None:
    inputs = batch(assembled.processor, ask("what", (16, 16)))
    with torch.no_grad():
        full = assembled.model(**inputs).logits
        last = assembled.model(**inputs, logits_to_keep=2).logits
        chosen = assembled.model(**inputs, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(last, full[:, -2:])
    torch.testing.assert_close(chosen, full[:, [1, 4]])


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_boolean_masks_and_positions_reach_the_decoder(tmp_path: Any, family: str, attention: str) -> None:
    """Two questions behind one image in one row equal two rows, when masked apart with restarting positions."""
    model, processor, _ = tiny_vlm(tmp_path, "llm", family=family)
    model.set_attn_implementation(attention)
    alone = [batch(processor, ask(question, (16, 16))) for question in ("what is this", "how many")]
    first, second = (row["input_ids"][0] for row in alone)
    shared = 1 + 4  # <|user|> and the image
    packed = torch.cat([first, second[shared:]])
    length, start = len(packed), len(first)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[start:, shared:start] = False
    positions = torch.cat([torch.arange(start), torch.arange(shared, len(second))])
    with torch.no_grad():
        logits = model(
            input_ids=packed[None],
            attention_mask=allowed[None, None],
            position_ids=positions[None],
            pixel_values=alone[0]["pixel_values"],
            image_grid_thw=alone[0]["image_grid_thw"],
        ).logits[0]
        torch.testing.assert_close(logits[:start], model(**alone[0]).logits[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(logits[start:], model(**alone[1]).logits[0, shared:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_that_may_attend_nowhere_give_numbers(attention: str) -> None:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[3] = False
    usable = usable_mask(mask[None, None], attention, torch.float32)
    assert usable is not None
    scores = usable if attention == "eager" else torch.zeros(1, 1, 4, 4).masked_fill(~usable, -torch.inf)
    weights = scores.softmax(dim=-1)
    assert weights[0, 0, 3].tolist() == [0, 0, 0, 1]
    assert usable_mask(None, attention, torch.float32) is None
    with pytest.raises(DataError, match="found 'flash_attention_2'"):
        usable_mask(mask[None, None], "flash_attention_2", torch.float32)


def test_gradient_checkpointing_reaches_both_towers(tmp_path: Any) -> None:
    model, processor, _ = tiny_vlm(tmp_path, "llm")
    inputs = _labelled(processor)
    model.train()
    model(**inputs).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls: list[str] = []
    towers = {"vision": model.model.vision_tower.model.decoder.layers[0], "text": model.model.language_model.layers[0]}
    for name, layer in towers.items():
        assert layer.gradient_checkpointing
        layer.mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model(**inputs).loss.backward()
    grids = 3  # the encoder runs once for each grid
    assert (calls.count("text"), calls.count("vision")) == (2, 2 * grids), "each layer runs again in the backward pass"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_a_text_only_draft_can_be_fitted(tmp_path: Any) -> None:
    from unclipped.models.generation import fit_draft

    tokenizer = tiny_tokenizer(compact=False)
    model, _, _ = tiny_vlm(tmp_path, "dinov2", tokenizer=tokenizer)
    draft = tiny_lm(family="llama", tokenizer=tokenizer, seed=3)
    fit_draft(draft, model)
    assert draft.config.vocab_size == model.config.text_config.vocab_size
    with pytest.raises(UsageError, match="larger than"):
        fit_draft(tiny_lm(tokenizer=tokenizer, vocab_size=400), model)


@pytest.mark.parametrize("supervised_only", [False, True])
def test_shift_labels_are_the_labels_that_count(assembled: Any, supervised_only: bool) -> None:
    """Rows cut over devices come with labels that were shifted before the cut."""
    model, inputs = assembled.model, _labelled(assembled.processor)
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    other = shifted.roll(1, dims=0)
    options = {"supervised_only": supervised_only}
    with torch.no_grad():
        expected = model(**inputs, labels=labels, **options).loss
        torch.testing.assert_close(model(**inputs, shift_labels=shifted, **options).loss, expected)
        torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted, **options).loss, expected)
        moved = model(**inputs, labels=labels, shift_labels=other, **options).loss
        torch.testing.assert_close(moved, model(**inputs, shift_labels=other, **options).loss)
    assert abs(moved.item() - expected.item()) > 1e-3


def test_a_placeholder_is_never_supervised_by_shift_labels(assembled: Any) -> None:
    inputs = _labelled(assembled.processor)
    targets = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
    with_images = targets.clone()
    with_images[0, :2] = assembled.processor.image_token_id
    with torch.no_grad():
        expected = assembled.model(**inputs, shift_labels=targets).loss
        assert torch.equal(assembled.model(**inputs, shift_labels=with_images).loss, expected)


@pytest.mark.parametrize("supervised_only", [False, True])
def test_every_keyword_reaches_the_loss_function(assembled: Any, supervised_only: bool) -> None:
    model, inputs = assembled.model, _labelled(assembled.processor)
    with torch.no_grad():
        expected = model(**inputs, supervised_only=supervised_only).loss
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, -7)
        found = model(**inputs, supervised_only=supervised_only, ignore_index=-7, num_items_in_batch=None).loss
    torch.testing.assert_close(found, expected)
    seen: dict[str, Any] = {}

    def loss(logits: torch.Tensor, **keywords: Any) -> torch.Tensor:
        seen.update(keywords)
        return logits.sum()

    usual = model.loss_function
    try:
        model.loss_function = loss
        model(**inputs, num_items_in_batch=3, z_loss=0.5)
    finally:
        model.loss_function = usual
    assert (seen["num_items_in_batch"], seen["z_loss"]) == (3, 0.5)
