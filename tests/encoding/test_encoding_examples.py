"""Encoding: ids are the chat template's, labels are the answers and their ends, whatever the template."""

from __future__ import annotations

import timeit
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.tiny_models import tiny_image, tiny_tokenizer
from unclipped.core.errors import DataError, ImageError
from unclipped.data.sample import ImagePart, Sample, SampleGroup, TextPart, Turn
from unclipped.encoding.chat import IGNORED, encoder_of
from unclipped.encoding.examples import encode, encode_group, encode_prompt, encode_sample
from unclipped.models.chat import default_template, with_images
from unclipped.models.image_processing import UnclippedImageProcessor
from unclipped.models.processing import UnclippedProcessor

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An empty think block before the last answer only, as reasoning models write it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
TRIMMING = "{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
BARE = "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{{ m['content'] }}\n{% endfor %}"
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|im_image|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "trimming": TRIMMING, "bare": BARE, "parts": PARTS_ONLY}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_image|>"]


def tokenizer_of(name: str) -> Any:
    if name == "compact":
        return tiny_tokenizer()
    tokenizer = tiny_tokenizer(compact=False, template=TEMPLATES.get(name))
    if name == "default":
        tokenizer.chat_template = default_template("<|im_image|>", eos_token="<|endoftext|>")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def processor_of(name: str, **rule: Any) -> UnclippedProcessor:
    tokenizer = tokenizer_of(name)
    token = "<|image|>" if name == "compact" else "<|im_image|>"
    template = tokenizer.chat_template
    if name in ("chatml", "thinking", "trimming", "bare"):
        template = with_images(template, token)
    images = UnclippedImageProcessor(**({"patch_size": 8, "max_tokens": 16} | rule))
    return UnclippedProcessor(images, tokenizer, chat_template=template, connector="mlp", image_token=token)


ALL = ["compact", "default", *TEMPLATES]
ENDS = {"compact": "<|end|>", "default": "<|endoftext|>", "bare": "<|endoftext|>"}


def talk(*texts: str, images: int = 0, system: str | None = None) -> Sample:
    turns = [] if system is None else [Turn("system", (TextPart(system),))]
    for number, text in enumerate(texts):
        parts: tuple[Any, ...] = (TextPart(text),)
        if number == 0:
            parts = (*(ImagePart(tiny_image(16, 8 * (k + 1))) for k in range(images)), *parts)
        turns.append(Turn("user" if number % 2 == 0 else "assistant", parts))
    return Sample("talk", tuple(turns))


def supervised(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=False)


@pytest.mark.parametrize("name", ALL)
def test_answers_and_their_ends_are_supervised_and_nothing_else(name: str) -> None:
    processor = processor_of(name)
    end = ENDS.get(name, "<|im_end|>")
    example = encode_sample(talk("what is this", "red circle", "how many", "2", images=2), processor)
    assert supervised(processor.tokenizer, example) == f"red circle{end}2{end}"
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    assert example.image_grid_thw is not None
    assert example.image_grid_thw.tolist() == [[1, 2, 1], [1, 2, 2]]
    assert example.input_ids.count(processor.image_token_id) == 6
    assert example.pixel_values is not None
    assert example.pixel_values.shape == (6, 3 * 64)


@pytest.mark.parametrize("name", ["compact", "default", "chatml", "thinking", "parts"])
def test_ids_are_those_of_the_rendered_template(name: str) -> None:
    """Where answers meet the literals at token borders, the pieces give what one pass over the whole text gives."""
    processor = processor_of(name)
    sample = talk("what is this", "red circle", "how many", "2", images=1)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in sample.turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    whole = processor(text=[text], images=[part.source for part in sample.images])
    assert encode_sample(sample, processor).input_ids == whole["input_ids"][0]
    if name not in ("thinking", "parts"):
        text = processor.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = processor(text=[text], images=[part.source for part in sample.images])
        assert encode_prompt(sample, processor).input_ids == whole["input_ids"][0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("texts", [("what",), ("what", "red"), ("what", "red", "how", "2"), ("what", "red", "how")])
def test_a_prompt_is_a_prefix_of_the_sample(name: str, texts: tuple[str, ...]) -> None:
    processor = processor_of(name)
    sample = talk(*texts, images=1)
    prompt = encode_prompt(sample, processor)
    answered = sample if len(texts) % 2 == 0 else talk(*texts, "blue", images=1)
    whole = encode_sample(answered, processor)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.labels[len(prompt.input_ids)] != IGNORED
    assert set(prompt.labels) == {IGNORED}


def test_the_empty_think_block_is_context_and_not_target() -> None:
    tokenizer = tokenizer_of("thinking")
    example = encode_sample(talk("what", "red"), tokenizer)
    text = tokenizer.decode(example.input_ids, skip_special_tokens=False)
    assert "<think>\n\n</think>\n\nred" in text
    assert supervised(tokenizer, example) == "red<|im_end|>"
    assert tokenizer.decode(encode_prompt(talk("what", "red"), tokenizer).input_ids).endswith("</think>\n\n")


def test_texts_are_trimmed_exactly_where_the_template_trims() -> None:
    kept, trimmed = tokenizer_of("chatml"), tokenizer_of("trimming")
    sample = talk(" what \n", " red ")
    assert supervised(kept, encode_sample(sample, kept)) == " red <|im_end|>"
    assert supervised(trimmed, encode_sample(sample, trimmed)) == "red<|im_end|>"
    assert "]\n\nwhat[" in trimmed.decode(encode_sample(sample, trimmed).input_ids, skip_special_tokens=True)


def test_a_template_without_end_gets_the_tokenizers() -> None:
    tokenizer = tokenizer_of("bare")
    example = encode_sample(talk("what", "red", "how", "2"), tokenizer)
    assert supervised(tokenizer, example) == "red<|endoftext|>2<|endoftext|>"
    assert example.input_ids.count(tokenizer.eos_token_id) == 2


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20), min_size=2),
    name=st.sampled_from(["compact", "chatml"]),
)
def test_any_text_comes_back_from_ids_and_labels(texts: list[str], name: str) -> None:
    texts = [f"{text}x" for text in texts[: len(texts) // 2 * 2]]  # never blank
    tokenizer = TOKENIZERS[name]
    example = encode_sample(talk(*texts), tokenizer)
    end = ENDS.get(name, "<|im_end|>")
    assert supervised(tokenizer, example) == "".join(answer + end for answer in texts[1::2])
    whole = tokenizer.decode(example.input_ids, skip_special_tokens=False)
    messages = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text} for number, text in enumerate(texts)
    ]
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)


TOKENIZERS = {name: tokenizer_of(name) for name in ("compact", "chatml")}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages[1:] %}{{ m['content'] }}<|im_end|>{% endfor %}", "drops"),
        ("{% for m in messages %}{{ m['content'] | upper | replace('0', '1') }}{% endfor %}", "drops|repeats"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "repeats"),
        ("{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}", "order"),
        ("{{ raise_exception('only tools here') }}", "only tools here"),
        ("{% for m in messages %}{{ m['content'] }}<|im_image|>{% endfor %}", "image token"),
    ],
)
def test_templates_that_lose_text_are_named(template: str, problem: str) -> None:
    processor = processor_of("chatml")
    processor.chat_template = template
    with pytest.raises(DataError, match=problem) as caught:
        encode_sample(talk("what", "red"), processor)
    assert "sample talk" in str(caught.value)
    assert "chat template" in str(caught.value)


@pytest.mark.parametrize("texts", [("what",), ("what", "", "how", " ")])
def test_no_answer_is_no_supervised_token(texts: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="sample talk: no supervised token"):
        encode_sample(talk(*texts), tokenizer_of("compact"))


def test_image_errors_name_sample_and_file(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    sample = Sample.qa("s9", [ImagePart(str(tmp_path / "bad.png"))], "what", "red")
    with pytest.raises(ImageError, match=r"sample s9: .*bad\.png"):
        encode_sample(sample, processor_of("compact"))
    with pytest.raises(DataError, match="tokenizer without image processor"):
        encode_sample(sample, tokenizer_of("compact"))
    inside = Sample("s8", (Turn("user", (TextPart("draw"),)), Turn("assistant", (ImagePart(tiny_image()),))))
    with pytest.raises(DataError, match="s8"):
        encode_sample(inside, processor_of("compact"))


def test_documents_are_supervised_whole_and_closed() -> None:
    tokenizer = tokenizer_of("compact")
    example = encode_sample(Sample.document("d", "red circle"), tokenizer)
    assert example.labels == example.input_ids
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == "red circle<|end|>"
    short = encode_sample(Sample.document("d", "red circle" * 20), tokenizer, max_length=7)
    assert (len(short.input_ids), short.truncated) == (7, True)
    with pytest.raises(DataError, match="no supervised token"):
        encode_sample(Sample.document("d", ""), tokenizer)


# Truncation


def test_the_oldest_exchange_without_image_goes_first() -> None:
    processor = processor_of("compact")
    sample = talk("look", "red", "old question here", "old answer", "how many", "2", images=1, system="short")
    whole = encode_sample(sample, processor)
    shorter = encode_sample(sample, processor, max_length=len(whole.input_ids) - 1)
    text = processor.tokenizer.decode(shorter.input_ids, skip_special_tokens=False)
    assert shorter.truncated
    assert not whole.truncated
    assert "old" not in text
    assert text.startswith("<|system|>short<|user|><|image|>")
    assert text.endswith("<|user|>how many<|assistant|>2<|end|>")
    assert shorter.input_ids.count(processor.image_token_id) == 2


def test_then_the_end_of_the_last_answer_is_cut() -> None:
    processor = processor_of("compact")
    sample = talk("look", "red red red red red red", images=1)
    whole = encode_sample(sample, processor)
    cut = encode_sample(sample, processor, max_length=len(whole.input_ids) - 3)
    assert cut.input_ids == whole.input_ids[:-3]
    assert cut.labels == whole.labels[:-3]


def test_an_image_span_is_never_cut() -> None:
    processor = processor_of("compact")
    late = Sample(
        "late",
        (
            Turn("user", (TextPart("what"),)),
            Turn("assistant", (TextPart("red"),)),
            Turn("user", (TextPart("and this "), ImagePart(tiny_image(16, 32)))),
            Turn("assistant", (TextPart("blue"),)),
        ),
    )
    whole = encode_sample(late, processor)
    last_image = len(whole.input_ids) - 1 - whole.input_ids[::-1].index(processor.image_token_id)
    # The first exchange goes before anything is cut, so shorter rows than the whole hold the span too.
    dropped = len(encode_sample(Sample("late", late.turns[:2]), processor).input_ids)
    shortest = last_image - dropped + 3  # the span, the assistant's mark, one token of the answer
    for length in range(1, shortest):
        with pytest.raises(DataError, match="sample late"):
            encode_sample(late, processor, max_length=length)
    for length in range(shortest, len(whole.input_ids)):
        example = encode_sample(late, processor, max_length=length)
        assert len(example.input_ids) <= length
        assert example.input_ids.count(processor.image_token_id) == 8
        assert any(label != IGNORED for label in example.labels)
    with pytest.raises(DataError, match="would fall into or before an image"):
        encode_sample(late, processor, max_length=6)


def test_a_cut_that_leaves_no_answer_is_an_error() -> None:
    tokenizer = tokenizer_of("compact")
    sample = talk("what is this what is this", "red")
    length = len(encode_prompt(sample, tokenizer).input_ids)
    with pytest.raises(DataError, match="no supervised token would be left"):
        encode_sample(sample, tokenizer, max_length=length)


# Groups about one image


def group_of(*pairs: tuple[str, str], image: Image.Image | None = None) -> SampleGroup:
    picture = ImagePart(image or tiny_image(16, 16), "picture")
    return SampleGroup(tuple(Sample.qa(f"g{number}", [picture], *pair) for number, pair in enumerate(pairs)))


@pytest.mark.parametrize("name", ALL)
def test_a_group_holds_the_image_once_and_every_sample_whole(name: str) -> None:
    processor = processor_of(name)
    group = group_of(("how many", "2"), ("how many red", "1 circle"), ("what is this", "red"))
    row = encode_group(group, processor)
    assert row.segments is not None
    assert row.positions is not None
    assert row.input_ids.count(processor.image_token_id) == 4
    assert row.sample_ids == ("g0", "g1", "g2")
    for block, sample in enumerate(group.samples, start=1):
        own = [index for index, segment in enumerate(row.segments) if segment in (0, block)]
        alone = encode_sample(sample, processor)
        assert [row.input_ids[index] for index in own] == alone.input_ids
        assert [row.labels[index] for index in own] == alone.labels
        assert [row.positions[index] for index in own] == list(range(len(alone.input_ids)))
        first = row.segments.index(block)
        assert row.labels[first] == IGNORED  # the position before it belongs to another block


def test_same_questions_still_leave_an_unsupervised_beginning() -> None:
    row = encode(group_of(("what", "red"), ("what", "red")), processor_of("compact"))
    assert row.segments is not None
    assert (
        row.num_supervised
        == 2 * encode_sample(group_of(("what", "red")).samples[0], processor_of("compact")).num_supervised
    )


def test_a_group_whose_image_comes_late_is_refused() -> None:
    picture = ImagePart(tiny_image(), "picture")
    samples = tuple(
        Sample(name, (Turn("user", (TextPart(name), picture)), Turn("assistant", (TextPart("red"),))))
        for name in ("this", "what")
    )
    with pytest.raises(DataError, match="share_image"):
        encode_group(SampleGroup(samples), processor_of("compact"))


def test_a_group_longer_than_allowed_names_the_remedy() -> None:
    with pytest.raises(DataError, match="max_group"):
        encode(group_of(("what", "red"), ("how", "2")), processor_of("compact"), max_length=8)


def test_the_encoder_notices_a_new_template_or_vocabulary() -> None:
    tokenizer = tokenizer_of("chatml")
    before = encode_sample(talk("what", "red"), tokenizer).input_ids
    tokenizer.chat_template = BARE
    assert encode_sample(talk("what", "red"), tokenizer).input_ids != before


def test_a_short_sample_costs_well_under_a_millisecond() -> None:
    """A bound that only a mistake in kind (rendering the template each time) would miss, busy machines included."""
    tokenizer = tokenizer_of("compact")
    samples = iter([Sample.qa(str(k), [], f"what is this {k}", f"red {k}") for k in range(3000)])
    best = min(timeit.repeat(lambda: encode_sample(next(samples), tokenizer), number=100, repeat=20)) / 100
    assert best < 1e-3


@pytest.mark.parametrize("name", ["compact", "default", "chatml", "thinking", "trimming", "bare", "parts"])
def test_a_pair_is_an_image_and_its_caption_as_the_answer(name: str) -> None:
    processor = processor_of(name)
    pair = Sample("p", (Turn("user", (ImagePart(tiny_image(16, 24)),)), Turn("assistant", (TextPart("a red boat"),))))
    example = encode_sample(pair, processor)
    (count,) = processor.num_image_tokens(example.image_grid_thw)
    token = encoder_of(processor).image_token_id
    assert example.input_ids.count(token) == count > 0
    assert all(label == IGNORED for label, each in zip(example.labels, example.input_ids, strict=True) if each == token)
    supervised = [label for label in example.labels if label != IGNORED]
    assert processor.tokenizer.decode(supervised[:-1]).strip() == "a red boat"
    assert all(label in (IGNORED, each) for label, each in zip(example.labels, example.input_ids, strict=True))
    prompt = encode_prompt(pair, processor)
    first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
    assert prompt.input_ids == example.input_ids[:first]
    # What is asked is the image alone: an empty question differs by the white space between image and text only.
    asked = encode_sample(Sample.qa("q", pair.images, "", "a red boat"), processor)
    rows = ["".join(processor.tokenizer.decode(each.input_ids).split()) for each in (asked, example)]
    assert rows[0] == rows[1]
