"""Unclipped: vision-language models without CLIP.

Importing the package loads neither torch nor transformers. It arranges that the model classes are entered in the Auto
classes of transformers as soon as those are there, so that after `import unclipped` a saved folder loads with
`AutoModelForImageTextToText.from_pretrained` and `pipeline("image-text-to-text")`.
"""

from unclipped import _registration

__version__ = "0.1.0"

_registration.arrange()
