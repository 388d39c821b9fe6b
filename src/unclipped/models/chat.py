"""Chat templates: our compact one, the default for language models without one, and how foreign ones learn images.

A template decides where the image token stands in a turn; nothing else in the package writes prompts by hand.
All templates are Jinja, so they are saved with the processor and work in every program that reads the folder.
"""

from __future__ import annotations

from unclipped.core.bounded import rendered
from unclipped.core.errors import CheckpointError, UnclippedError

COMPACT_IMAGE_TOKEN = "<|image|>"
COMPACT_TOKEN_NAMES = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
"""Roles of the compact template's tokens, as keyword arguments of a tokenizer."""

COMPACT_SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", COMPACT_IMAGE_TOKEN]
"""Every special token of the compact template; a tokenizer trained with it holds each as one id."""

# A content is a string or a list of parts; a part is a string or {"type": "image"} / {"type": "text", "text": …}.
_CONTENT_MACRO = (
    "{%- macro render(content, image, gap) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part is string -%}{{ part }}"
    "{%- elif part['type'] in ('image', 'image_url') -%}{{ image }}{%- if not loop.last -%}{{ gap }}{%- endif -%}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}{{ raise_exception('content part of type ' ~ part['type'] ~ ': expected text or image') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)

# Templates that know neither tools nor documents refuse them: an answer without them would look like one with them.
_NOTHING_ELSE = (
    "{%- if tools -%}{{ raise_exception('this template reads no tools; leave tools out') }}{%- endif -%}"
    "{%- if documents -%}{{ raise_exception('this template reads no documents; leave documents out') }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- for field in message if field not in ('role', 'content') and message[field] -%}"
    "{{ raise_exception('this template reads role and content only; leave ' ~ field ~ ' out of the message') }}"
    "{%- endfor -%}"
    "{%- endfor -%}"
)

COMPACT_TEMPLATE = (
    _CONTENT_MACRO
    + _NOTHING_ELSE
    + "{%- for message in messages -%}"
    + "{%- if message['role'] == 'assistant' -%}"
    + "{{ '<|assistant|>' }}{% generation %}{{ render(message['content'], '<|image|>', '') }}{{ '<|end|>' }}"
    + "{% endgeneration %}"
    + "{%- elif message['role'] in ('user', 'system') -%}"
    + "{{ '<|' ~ message['role'] ~ '|>' }}{{ render(message['content'], '<|image|>', '') }}"
    + "{%- else -%}{{ raise_exception('unknown role ' ~ message['role']) }}"
    + "{%- endif -%}"
    + "{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
"""`<|user|>{image}{text}<|assistant|>{answer}<|end|>`, turn after turn: one token of overhead a turn."""


def default_template(image_token: str, *, eos_token: str, bos_token: str | None = None) -> str:
    """The template of a language model that brings none.

    Turns read `User:\\n{content}\\n\\nAssistant:\\n{answer}{eos}\\n\\n`, a system message stands first on its own,
    an image is its token followed by a newline. `bos_token` is given only when the tokenizer itself puts one in front.
    """
    return (
        _CONTENT_MACRO
        + _NOTHING_ELSE
        + (f"{{{{ {_quoted(bos_token)} }}}}" if bos_token else "")
        + "{%- for message in messages -%}"
        + f"{{%- set body = render(message['content'], {_quoted(image_token)}, '\\n') -%}}"
        + "{%- if message['role'] == 'system' -%}{{ body ~ '\\n\\n' }}"
        + "{%- elif message['role'] == 'user' -%}{{ 'User:\\n' ~ body ~ '\\n\\n' }}"
        + "{%- elif message['role'] == 'assistant' -%}"
        + "{{ 'Assistant:\\n' }}"
        + f"{{% generation %}}{{{{ body }}}}{{{{ {_quoted(eos_token)} }}}}{{% endgeneration %}}"
        + "{{ '\\n\\n' }}"
        + "{%- else -%}{{ raise_exception('unknown role ' ~ message['role']) }}"
        + "{%- endif -%}"
        + "{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{ 'Assistant:\\n' }}{%- endif -%}"
    )


def with_images(template: str, image_token: str) -> str:
    """`template` of a text-only language model, made to understand image parts.

    A preamble turns list contents into plain text before the model's own template sees the messages: an image becomes
    `image_token`, followed by a newline when something follows it. String contents pass through untouched.
    """
    return (
        _CONTENT_MACRO
        + "{%- set turns = namespace(all=[]) -%}"
        + "{%- for message in messages -%}"
        + "{%- if message['content'] is defined and message['content'] is iterable"
        + " and message['content'] is not string and message['content'] is not mapping -%}"
        + "{%- set turns.all = turns.all + "
        + f"[dict(message, content=render(message['content'], {_quoted(image_token)}, '\\n'))] -%}}"
        + "{%- else -%}{%- set turns.all = turns.all + [message] -%}"
        + "{%- endif -%}"
        + "{%- endfor -%}"
        + "{%- set messages = turns.all %}"  # no dash: white space at the start of the template is the model's own
        + template
    )


def knows_images(template: str, image_token: str, where: str = "the tokenizer") -> bool:
    """Whether `template` places `image_token` for an image part, once, and keeps the text around it.

    Raises CheckpointError that names `where` when the template runs over its limits.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    probe = [
        {"role": "user", "content": [{"type": "text", "text": "probe-before"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "probe-after"}]},
    ]
    try:
        text = rendered(
            f"chat template of {where}",
            lambda: render_jinja_template(conversations=[probe], chat_template=template)[0][0],
            CheckpointError,
        )
    except UnclippedError:  # it runs for too long, or asks for too much
        raise
    except Exception:  # a template not written for lists of parts may raise anything
        return False
    return (
        text.count(image_token) == 1
        and text.count("probe-before") == 1
        and text.count("probe-after") == 1
        and "'type'" not in text
    )


def _quoted(token: str) -> str:
    """`token` as a Jinja string literal."""
    return "'" + token.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
