"""Entry of our classes in the Auto classes of transformers; public as `unclipped.register()`, called by our loaders."""

from __future__ import annotations

_done = False


def register() -> None:
    """Register configurations, models, processor and image processor; a second call does nothing."""
    global _done
    if _done:
        return
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from unclipped.encoders.llm_config import LLMVisionConfig
    from unclipped.encoders.llm_encoder import LLMVisionModel
    from unclipped.models.configuration import UnclippedConfig
    from unclipped.models.image_processing import UnclippedImageProcessor
    from unclipped.models.modeling import UnclippedForConditionalGeneration, UnclippedModel
    from unclipped.models.processing import UnclippedProcessor

    AutoConfig.register(LLMVisionConfig.model_type, LLMVisionConfig, exist_ok=True)
    AutoConfig.register(UnclippedConfig.model_type, UnclippedConfig, exist_ok=True)
    AutoModel.register(LLMVisionConfig, LLMVisionModel, exist_ok=True)
    AutoModel.register(UnclippedConfig, UnclippedModel, exist_ok=True)
    AutoModelForImageTextToText.register(UnclippedConfig, UnclippedForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(UnclippedConfig, UnclippedForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(UnclippedConfig, UnclippedProcessor, exist_ok=True)
    AutoImageProcessor.register(UnclippedConfig, UnclippedImageProcessor, exist_ok=True)
    _done = True
