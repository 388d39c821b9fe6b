"""An image as data name it: a file, bytes or a Pillow object, and the changes that are made once it is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

    ImageSource: TypeAlias = "str | Path | bytes | Image.Image"
    View: TypeAlias = "Callable[[Image.Image], Image.Image]"


@dataclass(frozen=True)
class ImagePart:
    """An image by path, encoded bytes, or Pillow object; `name` stands for it in error messages.

    `view` changes the decoded image before it is resized: it takes and returns a Pillow image in mode RGB. So an
    augmented image is decoded under the same rule as any other.
    """

    source: ImageSource
    name: str | None = None
    view: View | None = None

    @property
    def label(self) -> str:
        """What error messages call this image."""
        if self.name is not None:
            return self.name
        if isinstance(self.source, str | Path):
            return str(self.source)
        filename: Any = getattr(self.source, "filename", None)
        return str(filename) if filename else f"<{type(self.source).__name__}>"

    def changed(self, view: View) -> ImagePart:
        """The same image with `view` after the changes that it has already."""
        return replace(self, name=self.label, view=view if self.view is None else _Chain(self.view, view))


@dataclass(frozen=True)
class _Chain:
    first: View
    then: View

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.then(self.first(image))
