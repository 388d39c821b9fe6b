"""Unclipped: vision-language models without CLIP.

Importing the package loads neither torch nor transformers. It arranges that the model classes are entered in the Auto
classes of transformers as soon as those are there, so that after `import unclipped` a saved folder loads with
`AutoModelForImageTextToText.from_pretrained` and `pipeline("image-text-to-text")`.
"""

from typing import Any

from unclipped import _registration

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`sparse_prefill` is loaded when it is first asked for, because it needs torch."""
    if name == "sparse_prefill":
        from unclipped.attention.prefill import sparse_prefill

        return sparse_prefill
    raise AttributeError(f"module 'unclipped' has no attribute '{name}'")


_registration.arrange()
