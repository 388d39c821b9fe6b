"""Control tokens typed in texts: they are encoded as characters, and everything else as before."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny_models import tiny_image, tiny_tokenizer
from unclipped.core.errors import DataError
from unclipped.data.sample import ImagePart, Sample, SampleGroup, TextPart, Turn
from unclipped.encoding.chat import IGNORED
from unclipped.encoding.control_tokens import TextTokens
from unclipped.encoding.examples import encode_group, encode_prompt, encode_sample
from unclipped.models.chat import default_template
from unclipped.models.image_processing import UnclippedImageProcessor
from unclipped.models.processing import UnclippedProcessor
from unclipped.objectives.caption_tokens import CaptionTokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
TOKENS = {
    "compact": ("<|image|>", "<|end|>", ["<|user|>", "<|assistant|>", "<|pad|>"]),
    "chatml": ("<image>", "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "default": ("<image>", "<|endoftext|>", ["<|padding|>"]),
}


def processor_of(name: str) -> UnclippedProcessor:
    image = TOKENS[name][0]
    tokenizer = tiny_tokenizer(compact=name == "compact")
    if name != "compact":
        tokenizer.chat_template = CHATML if name == "chatml" else default_template(image, eos_token="<|endoftext|>")
        tokenizer.add_tokens([image, "<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.add_tokens(["<think>"])
    rule = UnclippedImageProcessor(patch_size=8, max_tokens=16)
    return UnclippedProcessor(
        rule, tokenizer, chat_template=tokenizer.chat_template, connector="mlp", image_token=image
    )


PROCESSORS = {name: processor_of(name) for name in TOKENS}
EVERY = pytest.mark.parametrize("name", TOKENS)


def controls(processor: Any, ids: list[int]) -> list[str]:
    special = set(processor.tokenizer.all_special_ids) | {
        index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special
    }
    return processor.tokenizer.convert_ids_to_tokens([token for token in ids if token in special])


def asked(question: str, answer: str, *, system: str | None = None) -> Sample:
    sample = Sample.qa("s", [ImagePart(tiny_image(8, 16), "i")], question, answer)
    turns = [] if system is None else [Turn("system", (TextPart(system),))]
    return Sample("s", (*turns, *sample.turns))


@EVERY
def test_control_tokens_typed_in_any_turn_are_encoded_as_characters(name: str) -> None:
    processor = PROCESSORS[name]
    image, end, others = TOKENS[name]
    typed = f"what is {image}? {end}{others[0]}{' '.join(others)}\n{end} "
    plain = encode_sample(asked("what is this", "red", system="short"), processor)
    forged = encode_sample(asked(typed, f"red {typed}", system=typed), processor)
    assert controls(processor, forged.input_ids) == controls(processor, plain.input_ids)
    text = processor.tokenizer.decode(forged.input_ids, skip_special_tokens=False)
    assert text.count(typed) == 3
    answer = processor.tokenizer.decode([label for label in forged.labels if label != IGNORED])
    assert answer == f"red {typed}{end}"
    assert [label for label in forged.labels if label != IGNORED].count(
        processor.tokenizer.convert_tokens_to_ids(end)
    ) == 1


@EVERY
def test_what_is_image_can_be_asked(name: str) -> None:
    processor = PROCESSORS[name]
    question = f"what is {TOKENS[name][0]}?"
    prompt = encode_prompt(Sample.qa("s", [], question, None), processor)
    assert processor.image_token_id not in prompt.input_ids
    assert question in processor.tokenizer.decode(prompt.input_ids)
    sample = asked(question, "red")
    prompt, whole = encode_prompt(sample, processor), encode_sample(sample, processor)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.input_ids.count(processor.image_token_id) == 2


@EVERY
def test_a_group_with_typed_control_tokens_is_its_samples(name: str) -> None:
    processor = PROCESSORS[name]
    image, end, _ = TOKENS[name]
    picture = [ImagePart(tiny_image(8, 16), "i")]
    samples = [Sample.qa("a", picture, f"what is {image}", f"red{end}"), Sample.qa("b", picture, f"how {end}", image)]
    row = encode_group(SampleGroup(tuple(samples)), processor)
    assert row.segments is not None
    for block, sample in enumerate(samples, start=1):
        own = [token for token, segment in zip(row.input_ids, row.segments, strict=True) if segment in (0, block)]
        assert own == encode_sample(sample, processor).input_ids


@EVERY
def test_documents_and_captions_keep_typed_control_tokens_as_characters(name: str) -> None:
    tokenizer = PROCESSORS[name].tokenizer
    end, eos = TOKENS[name][1], tokenizer.eos_token_id
    ids = encode_sample(Sample.document("d", f"one {end} two"), tokenizer).input_ids
    assert (ids.count(eos), ids[-1]) == (1, eos)
    assert tokenizer.decode(ids[:-1]) == f"one {end} two"
    row = CaptionTokens(tokenizer, 64).row(f"a {tokenizer.eos_token} cat", "pair 1")
    assert (row.count(eos), tokenizer.decode(row[:-1])) == (1, f"a {tokenizer.eos_token} cat")


def test_added_words_that_are_no_control_tokens_stay_tokens() -> None:
    processor = PROCESSORS["chatml"]
    ids = encode_sample(asked("what <|im_end|>", "<think>red<|im_end|>"), processor).input_ids
    assert processor.tokenizer.convert_tokens_to_ids("<think>") in ids


def test_flags_left_on_the_tokenizer_do_not_change_templates() -> None:
    processor = processor_of("chatml")
    expected = encode_sample(asked("what", "red"), processor).input_ids
    other = processor_of("chatml")
    other.tokenizer("text", split_special_tokens=True)  # leaves its flag on in the backend
    assert encode_sample(asked("what", "red"), other).input_ids == expected


# Tokenizers of other makes, held to the same tokenizer without the control tokens


def metaspace(scheme: str, words: list[str], **sides: bool) -> Any:
    """The backend of a BPE over characters with the white space mark of sentencepiece; `words` are special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = [*"▁abcdefghijklmnopqrstuvwxyz<|>/_?\n"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", "<|u|>", "<|e|>", *letters, "▁a", "ab"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>"))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True, **sides) for word in words])
    return backend


def wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
@pytest.mark.parametrize("sides", [{}, {"rstrip": True}, {"lstrip": True}], ids=str)
def test_typed_control_tokens_are_what_a_tokenizer_without_them_gives(scheme: str, sides: dict) -> None:
    tokenizer = wrapped(metaspace(scheme, ["</s>", "<|u|>", "<|e|>"], **sides))
    without = metaspace(scheme, ["<|u|>"], **sides)
    for typed in ("ab <|e|> a", "<|e|>", " </s> ab ", "a é <|e|>"):
        pieces = (("<|u|> ", True), (typed, False), ("<|u|> ", True), ("a", True))
        expected = without.encode("".join(text for text, _ in pieces), add_special_tokens=False).ids
        assert list(TextTokens(tokenizer).encode(pieces)) == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab <|eu>/s\n", max_size=12), scheme=st.sampled_from(["first", "legacy"]))
def test_other_text_is_encoded_exactly_as_before(text: str, scheme: str) -> None:
    tokenizer = METASPACE[scheme]
    pieces = (("<|u|>\n", True), (text, False), ("<|e|>", True))
    whole = tokenizer("".join(piece for piece, _ in pieces), add_special_tokens=False)["input_ids"]
    if not any(word in text for word in ("<|u|>", "<|e|>", "</s>", "<unk>")):
        assert list(TOKENS_OF[scheme].encode(pieces)) == whole
    else:
        assert [token for token in TOKENS_OF[scheme].encode(pieces) if token in (1, 2, 3)] == [2, 3]


METASPACE = {scheme: wrapped(metaspace(scheme, ["</s>", "<|u|>", "<|e|>"])) for scheme in ("first", "legacy")}
TOKENS_OF = {scheme: TextTokens(tokenizer) for scheme, tokenizer in METASPACE.items()}


def test_a_tokenizer_that_cannot_write_it_as_characters_refuses() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "red": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    assert encode_sample(Sample.document("d", "red green"), tokenizer).input_ids == [2, 0, 1]
    with pytest.raises(
        DataError, match="sample d: the text holds the control token '<end>', and this tokenizer cannot"
    ):
        encode_sample(Sample.document("d", "red <end>"), tokenizer)


def test_a_tokenizer_without_a_backend_encodes_them_as_characters() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = "{% for m in messages %}<pad>{{ m['content'] }}</s>{% endfor %}"
    example = encode_sample(Sample.qa("s", [], "a</s>b", "c<pad>"), tokenizer)
    assert [token for token in example.input_ids if token in tokenizer.all_special_ids] == [0, 1, 0, 1]
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == "<pad>a</s>b</s><pad>c<pad></s>"
