"""Generation: caches, batches, drafts and prompt lookup give the tokens that plain decoding gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from support.prompts import ask, batch
from support.tiny_models import tiny_lm, tiny_tokenizer, tiny_vlm

NEW = 8


def greedy(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """Exactly NEW new tokens a row."""
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose output layer is its own: with tied random embeddings it would repeat the last token for ever."""
    model, processor, _ = tiny_vlm(
        tmp_path_factory.mktemp("varied"),
        "llm",
        connector="average(1x2) + mlp(2)",
        lm_overrides={"tie_word_embeddings": False},
    )
    return SimpleNamespace(model=model, processor=processor)


@pytest.fixture(scope="module")
def inputs(assembled: Any) -> dict[str, Any]:
    return batch(assembled.processor, ask("what is this", (16, 32), (24, 16)))


@pytest.fixture(scope="module")
def plain(assembled: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return greedy(assembled.model, inputs, use_cache=False)


def test_plain_decoding_is_the_forward_pass(assembled: Any, inputs: dict[str, Any], plain: torch.Tensor) -> None:
    model, ids = assembled.model, inputs["input_ids"]
    assert len(set(plain[0].tolist())) >= 4, "an answer worth comparing"
    forbidden = [assembled.processor.image_token_id, model.generation_config.eos_token_id]
    for step in range(NEW):
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[:, -1]
        logits[:, forbidden] = -torch.inf
        token = logits.argmax(dim=-1, keepdim=True)
        assert token.item() == plain[0, step]
        ids = torch.cat([ids, token], dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(assembled: Any, inputs: dict[str, Any], plain: torch.Tensor, cache: str) -> None:
    assert torch.equal(greedy(assembled.model, inputs, cache_implementation=cache), plain)


def test_chunked_prefill(assembled: Any, inputs: dict[str, Any], plain: torch.Tensor) -> None:
    assert torch.equal(greedy(assembled.model, inputs, prefill_chunk_size=4), plain)


def test_a_left_padded_mixed_batch_equals_its_rows(assembled: Any) -> None:
    conversations = [ask("what is this", (16, 32), (24, 16)), ask("how many"), ask("red", (40, 16))]
    together = greedy(assembled.model, batch(assembled.processor, *conversations))
    for row, conversation in enumerate(conversations):
        assert torch.equal(greedy(assembled.model, batch(assembled.processor, conversation)), together[row : row + 1])


def test_several_turns_with_images(assembled: Any) -> None:
    turns = [
        *ask("what is this", (16, 16)),
        {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
        *ask("and this", (24, 32), offset=40),
    ]
    inputs = batch(assembled.processor, turns)
    assert (inputs["input_ids"] == assembled.processor.image_token_id).sum() == 2 + 6
    assert greedy(assembled.model, inputs).shape == (1, NEW)


def test_beams_and_several_answers(assembled: Any, inputs: dict[str, Any]) -> None:
    beams = assembled.model.generate(**inputs, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    assert beams.shape[0] == 2


def test_embeddings_in_place_of_ids_return_new_tokens_only(
    assembled: Any, inputs: dict[str, Any], plain: torch.Tensor
) -> None:
    model = assembled.model
    with torch.no_grad():
        embeds, _ = model.model._embed(
            inputs["input_ids"], None, model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]), None
        )
    new = model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
    )
    assert torch.equal(new, plain)


@pytest.mark.parametrize("kind", ["vision-language", "narrow vision-language", "text-only"])
def test_drafts_are_token_equal(
    assembled: Any, inputs: dict[str, Any], plain: torch.Tensor, kind: str, tmp_path: Any
) -> None:
    if kind == "text-only":
        draft = tiny_lm(family="llama", seed=5)
    else:
        overrides = {"hidden_size": 16, "head_dim": 4} if kind.startswith("narrow") else {}
        draft, _, _ = tiny_vlm(
            tmp_path, "llm", connector="average(1x2) + mlp(2)", seed=5, lm_overrides={"layers": 1, **overrides}
        )
    assert torch.equal(greedy(assembled.model, inputs, assistant_model=draft), plain)


def test_a_draft_looks_at_the_images_with_its_own_eyes(assembled: Any, inputs: dict[str, Any], tmp_path: Any) -> None:
    draft, _, _ = tiny_vlm(tmp_path, "llm", connector="average(1x2) + mlp(2)", seed=5)
    seen: list[torch.Tensor] = []
    handle = draft.model.connector.register_forward_hook(lambda *call: seen.append(call[2][0]))
    greedy(assembled.model, inputs, assistant_model=draft)
    handle.remove()
    with torch.no_grad():
        own = draft.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], torch.cat(own))


@pytest.mark.parametrize("width", [1, 2])
def test_prompt_lookup_never_proposes_a_placeholder(assembled: Any, width: int) -> None:
    model, processor = assembled.model, assembled.processor
    # The question repeats what stands before the image, so that lookup would run into the placeholders.
    inputs = batch(processor, [{"role": "user", "content": [
        {"type": "text", "text": "red"}, *ask("red blue red", (16, 32))[0]["content"], {"type": "text", "text": " red"},
    ]}])  # fmt: skip
    expected = greedy(model, inputs)
    proposed: list[torch.Tensor] = []
    make = model._get_candidate_generator

    def recording(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        propose = generator.get_candidates

        def get_candidates(ids: torch.Tensor, **more: Any) -> Any:
            candidates, logits = propose(ids, **more)
            proposed.append(candidates[0, ids.shape[1] :])
            return candidates, logits

        generator.get_candidates = get_candidates
        return generator

    model._get_candidate_generator = recording
    try:
        found = greedy(model, inputs, prompt_lookup_num_tokens=6, max_matching_ngram_size=width)
    finally:
        del model._get_candidate_generator
    assert torch.equal(found, expected)
    assert proposed
    assert processor.image_token_id not in torch.cat(proposed)


def test_lookup_would_propose_placeholders_if_it_could(assembled: Any) -> None:
    """The case above is a real one: with the processors left out, the next token of the match is a placeholder."""
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    image, word = assembled.processor.image_token_id, 40
    ids = torch.tensor([[word, image, image, word]])
    bare = PromptLookupCandidateGenerator(num_output_tokens=2, max_matching_ngram_size=1, max_length=20)
    assert image in bare.get_candidates(ids)[0][0, 4:]
    processors = assembled.model._get_logits_processor(
        assembled.model.generation_config, input_ids_seq_length=4, encoder_input_ids=ids, device="cpu", model_kwargs={}
    )
    guarded = PromptLookupCandidateGenerator(
        num_output_tokens=2, max_matching_ngram_size=1, max_length=20, logits_processor=processors,
        vocab_size=assembled.model.config.text_config.vocab_size,
    )  # fmt: skip
    assert torch.equal(guarded.get_candidates(ids)[0], ids)


@pytest.mark.parametrize("fresh_settings", [False, True])
def test_an_image_token_is_never_written(tmp_path: Any, fresh_settings: bool) -> None:
    model, processor, _ = tiny_vlm(tmp_path, "llm", lm_overrides={"tie_word_embeddings": False})
    image = processor.image_token_id
    with torch.no_grad():  # make the image token the most probable token everywhere
        model.lm_head.weight.zero_()
        model.lm_head.weight[image] = model.model.language_model.norm.weight * 0 + 1
        model.lm_head.weight[image + 1] = -1
    inputs = batch(processor, ask("what", (16, 16)))
    settings = {"generation_config": GenerationConfig(max_new_tokens=4)} if fresh_settings else {"max_new_tokens": 4}
    new = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert image not in new


def test_answers_end_where_the_template_ends_turns(tmp_path: Any) -> None:
    """A base model's end of sequence is not what its chat template closes a turn with: both end an answer."""
    template = (
        "{%- for m in messages -%}{{ '<|im_start|>' ~ m['role'] ~ '\\n' ~ m['content'] ~ '<|im_end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )
    tokenizer = tiny_tokenizer(compact=False, template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model, processor, _ = tiny_vlm(tmp_path, "dinov2", tokenizer=tokenizer)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id, end]
