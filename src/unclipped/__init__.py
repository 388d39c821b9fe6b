"""Unclipped: vision-language models without CLIP.

Importing the package loads neither torch nor transformers and changes nothing outside it. After `unclipped.register()`
a saved folder loads with `AutoModelForImageTextToText.from_pretrained` and `pipeline("image-text-to-text")`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODELS = {
    "UnclippedConfig": "unclipped.models.configuration",
    "UnclippedForConditionalGeneration": "unclipped.models.modeling",
    "UnclippedImageProcessor": "unclipped.models.image_processing",
    "UnclippedModel": "unclipped.models.modeling",
    "UnclippedProcessor": "unclipped.models.processing",
}
_OTHERS = {"register": "unclipped.models.register", "sparse_prefill": "unclipped.attention.prefill"}


def __getattr__(name: str) -> Any:
    """What needs torch is loaded when it is first asked for; asking for a model's class registers all of them."""
    module = (_MODELS | _OTHERS).get(name)
    if module is None:
        raise AttributeError(f"module 'unclipped' has no attribute '{name}'")
    if name in _MODELS:
        from unclipped.models.register import register

        register()
    return getattr(importlib.import_module(module), name)
