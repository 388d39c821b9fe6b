"""The processor: texts with image tokens and images in, expanded token ids and packed patches out."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.processing_utils import MultiModalData, ProcessorMixin

from unclipped.connectors.config import ConnectorConfig, parse_connector
from unclipped.core.errors import DataError, UsageError, first_line

# Fields of a message that every template reads.
_READ_FIELDS = frozenset({"role", "content"})
# Where an image part holds its picture, in the order of transformers.
_SOURCES = ("image", "url", "path", "base64")
# transformers gives a bare tokenizer, without a word, for a processor class that is not registered. A class that is
# said to lie elsewhere makes it stop instead, with this text; it is not looked up once the class is registered.
_ELSEWHERE = (
    "this processor is of the Python package 'unclipped': call unclipped.register() before loading. It holds no code."
    "--unclipped.UnclippedProcessor"
)


class UnclippedProcessor(ProcessorMixin):
    """Image processor, tokenizer, chat template, and the connector's text form, from which token counts follow.

    `processor(text=…, images=…)` expects one image token in the text for each image and expands it to the number of
    visual tokens; `apply_chat_template` places the image tokens from the messages. The tokenizer pads on the left, as
    generation needs it, also when the folder was saved with another side.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        connector: str | ConnectorConfig = "mlp",
        image_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._connector = parse_connector(connector)
        self.connector = str(self._connector)  # a string, so that it is saved with the processor
        token: str | None = image_token or getattr(tokenizer, "image_token", None)
        if token is None:
            raise UsageError("processor: no image_token; name the token of the vocabulary that stands for an image")
        self.image_token: str = token
        self.image_token_id = tokenizer.convert_tokens_to_ids(token)
        if self.image_token_id is None or tokenizer.encode(self.image_token, add_special_tokens=False) != [
            self.image_token_id
        ]:
            raise UsageError(
                f"processor: image token '{self.image_token}' is not one id of the tokenizer; add it as a special token"
            )
        # Generation continues at the right end. Only what is among `init_kwargs` is saved with a tokenizer.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def to_dict(self) -> dict[str, Any]:
        """What is saved. A program that has not registered our classes gets an error from it that names the package."""
        return {**super().to_dict(), "auto_map": {"AutoProcessor": _ELSEWHERE}}

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """The prompt of one conversation or a list of them, as transformers makes it; `base64` images are decoded.

        Raises UsageError for tools, documents and fields of a message (tool_calls, reasoning_content) that the template
        does not read, and for an image that is not valid base64: nothing is left out of the prompt in silence.
        """
        template = self._template_text(chat_template)
        for name in ("tools", "documents"):
            if kwargs.get(name) and not _reads(template, name):
                raise UsageError(
                    f"{name}: the chat template does not read them; leave them out, or give another template"
                )
        many = _is_list(conversation) and bool(conversation) and _is_list(conversation[0])
        checked = [
            [_checked_message(message, f"message {index}", template) for index, message in enumerate(messages)]
            if _is_list(messages)
            else messages
            for messages in (conversation if many else [conversation])
        ]
        try:
            return super().apply_chat_template(checked if many else checked[0], chat_template, **kwargs)
        except TemplateError as error:
            raise UsageError(f"chat template: {first_line(error)}") from error

    def _template_text(self, chosen: str | None) -> str:
        """The text of the template that will be rendered: `chosen` by name or by text, else the processor's own."""
        own: Any = self.chat_template
        if isinstance(own, Mapping):
            return str(own.get(chosen or "default", chosen or ""))
        return chosen or own or ""

    def num_image_tokens(self, image_grid_thw: Any) -> list[int]:
        """Placeholders of each image, from grids (num_images, 3) in patches, a tensor or a list."""
        grids = image_grid_thw.tolist() if hasattr(image_grid_thw, "tolist") else image_grid_thw
        return self._connector.num_tokens(grids)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that takes the place of image `image_idx`'s token: as many image tokens as it has visual tokens."""
        grid = image_inputs["image_grid_thw"][image_idx]
        return self.image_token * self.num_image_tokens([[int(n) for n in grid]])[0]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Tokens and patches of images of these (height, width) px, without the images; serving programs ask this."""
        if image_sizes is None:
            return MultiModalData()
        rows = [self.image_processor.grid_of(int(height), int(width)) for height, width in image_sizes]
        grids = [(1, h, w) for h, w in rows]
        return MultiModalData(
            num_image_tokens=self.num_image_tokens(grids), num_image_patches=[h * w for _, h, w in grids]
        )

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check that each sample has one image token an image. Raises DataError that names the sample's index."""
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            self._check_images(texts, images)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _check_images(self, texts: list[str], images: Any) -> None:
        tokens = [sample.count(self.image_token) for sample in texts]
        given = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        nested = bool(given) and all(isinstance(entry, (list, tuple)) for entry in given)
        if nested and len(given) == len(texts):
            counts = [len(entry) for entry in given]
        elif len(texts) == 1 or sum(tokens) == _count(given):
            counts = [_count(given)] if len(texts) == 1 else tokens
        else:
            raise DataError(
                f"{len(texts)} samples hold {sum(tokens)} image tokens '{self.image_token}' {tokens}, found "
                f"{_count(given)} images; give one image token for each image, or a list of images for each sample"
            )
        for index, (expected, found) in enumerate(zip(tokens, counts, strict=True)):
            if expected != found:
                raise DataError(
                    f"sample {index}: {expected} image tokens '{self.image_token}' in the text, found {found} images; "
                    "give one image token for each image"
                )

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Check that tokenising kept every placeholder. Raises DataError when truncation cut into an image."""
        ids = text_inputs["input_ids"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        for index, (row, sample) in enumerate(zip(ids, text, strict=True)):
            expected = len(re.findall(re.escape(self.image_token), sample))
            found = list(row).count(self.image_token_id)
            if expected != found:
                raise DataError(
                    f"sample {index}: {expected} visual tokens in the text, {found} left after tokenising; truncation "
                    "cut into an image: raise max_length, shrink the image, or switch truncation off"
                )


def _count(images: Any) -> int:
    """Number of images in a nested list."""
    return sum(_count(entry) if isinstance(entry, (list, tuple)) else 1 for entry in images)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _reads(template: str, name: str) -> bool:
    """Whether a template mentions a variable or a field."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _checked_message(message: Any, where: str, template: str) -> Any:
    """The message with its base64 images as bytes. Raises UsageError for what the template would leave out."""
    if not isinstance(message, Mapping):
        return message
    for name, value in message.items():
        if value and name not in _READ_FIELDS and not _reads(template, str(name)):
            raise UsageError(
                f"{where}: the chat template does not read '{name}'; leave it out, or give another template"
            )
    content = message.get("content")
    if content is None and not any(message[name] for name in message if name not in _READ_FIELDS):
        raise UsageError(f"{where}: no content; give a text or a list of parts")
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": [_one_source(part, f"{where}, part {index}") for index, part in enumerate(content)]}


def _one_source(part: Any, where: str) -> Any:
    """An image part with the first picture that it holds alone, base64 text as bytes; any other part as it is."""
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return part
    others = {key: value for key, value in part.items() if key not in _SOURCES}
    name = next((key for key in _SOURCES if part.get(key) is not None), None)
    if name != "base64":
        return others if name is None else {**others, name: part[name]}
    try:
        return {**others, "image": base64.b64decode(part["base64"], validate=True)}
    except (binascii.Error, ValueError, TypeError):
        raise UsageError(f"{where}: 'base64' is not valid base64; encode the bytes of an image file") from None
