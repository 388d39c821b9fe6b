"""Chat templates: ours, the default, and those of language models that know nothing of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from unclipped.models.chat import (
    COMPACT_SPECIAL_TOKENS,
    COMPACT_TEMPLATE,
    default_template,
    knows_images,
    with_images,
)

IMAGE = {"type": "image"}
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "what?\n"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": "and now?"},
]
# Written for text alone, with an empty block for a thought that is not asked for.
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' ~ m['role'] ~ '\\n' ~ m['content'] ~ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if not (enable_thinking is defined and enable_thinking) -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
    "{%- endif -%}"
)


def render(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return render_jinja_template(conversations=[messages], chat_template=template, **options)[0][0]


def test_compact() -> None:
    assert render(COMPACT_TEMPLATE, TALK, add_generation_prompt=True) == (
        "<|system|>be short<|user|><|image|>what?\n<|assistant|>a cat<|end|><|user|>and now?<|assistant|>"
    )
    assert len(set(COMPACT_SPECIAL_TOKENS)) == 6


def test_default() -> None:
    template = default_template("<image>", eos_token="</s>", bos_token="<s>")
    assert render(template, TALK, add_generation_prompt=True) == (
        "<s>be short\n\nUser:\n<image>\nwhat?\n\n\nAssistant:\na cat</s>\n\nUser:\nand now?\n\nAssistant:\n"
    )
    assert not render(default_template("<image>", eos_token="</s>"), TALK).startswith("<s>")


def test_a_text_template_learns_images() -> None:
    template = with_images(CHATML, "<image>")
    assert render(template, TALK) == (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n<image>\nwhat?\n<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n"
    )
    texts = [{"role": "user", "content": "plain"}, {"role": "assistant", "content": "text"}]
    assert render(template, texts) == render(CHATML, texts)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE, IMAGE, {"type": "text", "text": "q"}], "<image>\n<image>\nq"),
        ([{"type": "text", "text": "q"}, IMAGE], "q<image>"),
        ([{"type": "text", "text": "a "}, IMAGE, {"type": "text", "text": "b"}], "a <image>\nb"),
        (["a", {"type": "image_url", "image_url": {"url": "x"}}], "a<image>"),
    ],
)
def test_places_of_images(content: list[Any], expected: str) -> None:
    rendered = render(with_images(CHATML, "<image>"), [{"role": "user", "content": content}])
    assert rendered == f"<|im_start|>user\n{expected}<|im_end|>\n"


def test_knowing_images() -> None:
    assert not knows_images(CHATML, "<image>")
    assert not knows_images("{{ messages[0]['content'].strip() }}", "<image>")
    assert not knows_images("{{ messages[0]['content'][9]['text'] }}", "<image>")
    assert knows_images(with_images(CHATML, "<image>"), "<image>")
    assert knows_images(COMPACT_TEMPLATE, "<|image|>")
    assert not knows_images(COMPACT_TEMPLATE, "<image>")
    assert not knows_images("always the same", "<image>")


@pytest.mark.parametrize("template", [COMPACT_TEMPLATE, with_images(CHATML, "<image>")])
def test_parts_that_cannot_be_placed_are_refused(template: str) -> None:
    with pytest.raises(TemplateError, match="type audio: expected text or image"):
        render(template, [{"role": "user", "content": [{"type": "audio"}]}])


@pytest.mark.parametrize("template", [COMPACT_TEMPLATE, default_template("<image>", eos_token="</s>")])
def test_unknown_roles_are_refused(template: str) -> None:
    with pytest.raises(TemplateError, match="unknown role tool"):
        render(template, [{"role": "tool", "content": "x"}])


def test_prompts_of_a_published_model(golden_folder: Path) -> None:
    """ChatML with images, as an independent implementation renders it: with and without an empty thought."""
    golden = json.loads((golden_folder / "penguin" / "chat.json").read_text())
    template = with_images(CHATML, "<image>")
    contents = {
        "image": [IMAGE, {"type": "text", "text": "What?"}],
        "timed_image": [{"type": "text", "text": "Time 3.3s: "}, IMAGE, {"type": "text", "text": "Q"}],
    }
    for name, content in contents.items():
        for mode, thinking in (("nothink", False), ("think", True)):
            rendered = render(
                template,
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                enable_thinking=thinking,
            )
            assert rendered == golden[name][mode]
