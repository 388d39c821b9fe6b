"""What generation needs beyond transformers: an image placeholder is never written, proposed or drafted."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor

from unclipped.core.errors import UsageError


class UnclippedGenerationMixin(GenerationMixin):
    """`generate` with caches, batches, assisted decoding and prompt lookup, over placeholders that hold images."""

    # Of the model class that this is mixed into.
    config: Any
    device: Any
    dtype: Any
    main_input_name: str
    base_model_prefix: str
    _is_stateful: bool

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """The usual processors, and the image token at minus infinity.

        Prompt lookup asks the processors which proposals are forbidden, so this also keeps it from proposing the
        placeholders that fill the prompt.
        """
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        device = kwargs.get("device") or self.device
        processors.append(SuppressTokensLogitsProcessor([self.config.image_token_id], device=device))
        return processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        """The usual generator; a draft model sees the images through its own tower, or not at all."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        draft = getattr(generator, "assistant_model", None)
        inputs = getattr(generator, "assistant_kwargs", None)
        if draft is None or draft is self or inputs is None:
            return generator
        images: Any = (inputs.pop("mm_encoder_outputs", None) or {}).get("image")
        pixel_values = getattr(images, "pixel_values", None)
        if pixel_values is not None and hasattr(draft, "get_image_features"):
            with torch.no_grad():
                features = draft.get_image_features(
                    pixel_values.to(draft.device), images.patch_grid_thw.to(draft.device)
                )
            inputs["mm_encoder_outputs"] = {"image": features}
        return generator


def fit_draft(draft: Any, model: Any) -> Any:
    """Give a text-only draft model of the same tokenizer the rows that assembly added to the vocabulary, in place.

    Returns the draft. Raises UsageError when the draft's vocabulary is larger than the model's.
    """
    wanted = model.config.get_text_config().vocab_size
    found = draft.config.get_text_config().vocab_size
    if found > wanted:
        raise UsageError(
            f"draft model: its vocabulary of {found} is larger than the model's {wanted}; "
            "a draft needs the same tokenizer"
        )
    if found < wanted:
        draft.resize_token_embeddings(wanted, mean_resizing=False)
    return draft
