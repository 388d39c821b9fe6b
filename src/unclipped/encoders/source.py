"""Vision source: the text or the value by which a recipe says where an encoder comes from. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from unclipped.core.config import FrozenConfig, Layers, Number, Options, PatchSide, PathText

LLM_PREFIX = "llm:"


class LanguageModelSource(FrozenConfig):
    """An encoder made from a language model; its text form, with every other field at its default, is `llm:ID`."""

    llm: PathText
    """Folder, hub id or GGUF file of a decoder language model."""
    patch_size: tuple[PatchSide, PatchSide] | PatchSide = 14
    """(height, width) in px of a patch."""
    rope: Literal["axial", "penguin"] = "axial"
    """Form of the two-dimensional positions."""
    rope_theta: Annotated[Number, Field(gt=0, le=1e12)] | None = None
    """Base frequency of the positions; null: the language model's own."""
    stem: Literal["linear", "convolution"] = "linear"
    """First layer: one linear map, or two convolutions before it."""
    layers: Layers | None = None
    """The first so many layers of the language model; null: all of them."""

    def options(self) -> dict[str, Any]:
        """The fields as `load_encoder` takes them."""
        fields = {"rope_form" if name == "rope" else name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in fields.items() if name != "llm" and value is not None}

    def __str__(self) -> str:
        return LLM_PREFIX + self.llm


def parse_vision(value: Any) -> Any:
    """`llm:ID` as the value that it is short for; anything else as it is."""
    if isinstance(value, str) and value.startswith(LLM_PREFIX):
        return {"llm": value.removeprefix(LLM_PREFIX)}
    return value


def _kind(value: Any) -> str:
    if isinstance(value, LanguageModelSource) or (isinstance(value, dict) and "llm" in value):
        return "of a language model"
    return "shape" if isinstance(value, dict) else "folder"


VisionSource = Annotated[
    Annotated[PathText, Tag("folder")]
    | Annotated[LanguageModelSource, Tag("of a language model")]
    | Annotated[Options, Tag("shape")],
    Discriminator(_kind),
]
"""Folder or hub id of an encoder, a language model to make one of, or a configuration with its `model_type`."""
