"""The processor: texts with image tokens and images in, expanded token ids and packed patches out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.processing_utils import MultiModalData, ProcessorMixin

from unclipped.connectors.config import ConnectorConfig, parse_connector
from unclipped.core.errors import DataError, UsageError


class UnclippedProcessor(ProcessorMixin):
    """Image processor, tokenizer, chat template, and the connector's text form, from which token counts follow.

    `processor(text=…, images=…)` expects one image token in the text for each image and expands it to the number of
    visual tokens; `apply_chat_template` places the image tokens from the messages.
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
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

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
