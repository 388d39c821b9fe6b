"""Small conversations with images, and their batches."""

from __future__ import annotations

from typing import Any

from support.tiny_models import tiny_image


def ask(question: str = "what is this", *sizes: tuple[int, int], offset: int = 0) -> list[dict[str, Any]]:
    """One user turn: an image of each (height, width) px, then the question."""
    images = [
        {"type": "image", "image": tiny_image(*size, offset=offset + 7 * index)} for index, size in enumerate(sizes)
    ]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def batch(processor: Any, *conversations: list[dict[str, Any]], side: str | None = None) -> dict[str, Any]:
    """Padded model inputs of these conversations, ready for the answer.

    side: of the padding; the processor's own by default.
    """
    own = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = side or own
    try:
        return dict(
            processor.apply_chat_template(
                list(conversations),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        )
    finally:
        processor.tokenizer.padding_side = own
