"""The image processor of an Unclipped model: images in, packed patches and their grids out.

It is an ordinary transformers image processor whose settings are the fields of `ImageRule`: they stand in
`preprocessor_config.json`, can be read and set as attributes, and can be given for one call. The steps themselves are
those of `unclipped.images`; the base class's own pipeline (which checks every option of every processor on every call)
is not entered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from unclipped.core.errors import ImageError, UsageError, nearest
from unclipped.images.config import ImageRule
from unclipped.images.decode import ImageSource, load_image
from unclipped.images.preprocess import preprocess_image
from unclipped.images.rules import grid_of

_FIELDS = frozenset(ImageRule.model_fields)
# Keys of a saved file that describe the file and not the processing.
_SERVICE_KEYS = frozenset({"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"})


class UnclippedImagesKwargs(ImagesKwargs, total=False):
    """The fields of `ImageRule`, as options of one call; see there for meaning and units."""

    rule: str
    size: int | list[int] | tuple[int, ...] | None  # type: ignore[misc]
    patch_size: int | list[int] | tuple[int, ...]
    merge: int | list[int] | tuple[int, ...]
    min_tokens: int
    max_tokens: int
    fixed_height: int | None
    native_variant: str
    shorter_side: int | None
    mean: float | list[float] | tuple[float, ...]
    std: float | list[float] | tuple[float, ...]
    channels: int
    resample: str  # type: ignore[misc]
    background: list[int] | tuple[int, ...]
    max_pixels: int
    max_side: int


class UnclippedImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (sum_patches, C*ph*pw) float32 and `image_grid_thw` (num_images, 3) int64, row-major.

    UnclippedImageProcessor(ImageRule(…)) or UnclippedImageProcessor(rule="native", patch_size=14, merge=2, …).
    Raises UsageError for an unknown or mistyped field, ImageError for an image that cannot be used.
    """

    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012 (the base class declares it so)
    valid_kwargs = UnclippedImagesKwargs
    image_rule: ImageRule

    def __init__(self, image_rule: ImageRule | None = None, **fields: Any) -> None:
        super().__init__()
        fields = {key: value for key, value in fields.items() if key not in _SERVICE_KEYS}
        self.image_rule = _changed(image_rule, fields) if fields or image_rule is None else image_rule

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS and "image_rule" in self.__dict__:
            return getattr(self.image_rule, name)
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIELDS:  # the rule is immutable: make the changed one, validated whole
            self.image_rule = _changed(self.image_rule, {name: value})
        else:
            super().__setattr__(name, value)

    def __call__(self, images: Any, return_tensors: str | None = None, **fields: Any) -> BatchFeature:  # type: ignore[override]
        """Decode, resize, cut and normalise.

        images: one image or a list of them, nested lists flattened in order; an image is whatever `load_image` takes
        (path, bytes, PIL image, uint8 array with channels last). fields: `ImageRule` fields for this call only.
        return_tensors: "pt" (also when None) or "np".
        Returns pixel_values float32 (sum_patches, C*ph*pw) and image_grid_thw int64 (num_images, 3).
        """
        fields = {key: value for key, value in fields.items() if value is not None}
        rule = _changed(self.image_rule, fields) if fields else self.image_rule
        patches: list[torch.Tensor] = []
        grids: list[tuple[int, int, int]] = []
        for index, source in enumerate(_flat(images)):
            named = isinstance(source, (str, Path)) or getattr(source, "filename", None)
            image = load_image(
                source,
                name=None if named else f"image {index}",
                max_pixels=rule.max_pixels,
                max_side=rule.max_side,
                background=rule.background,
                keep_grey=True,
            )
            image_patches, grid = preprocess_image(image, rule)
            patches.append(image_patches)
            grids.append(grid)
        if len(patches) == 1:
            pixel_values = patches[0]
        else:
            pixel_values = torch.cat(patches) if patches else torch.empty(0, rule.patch_values)
        grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        if return_tensors in (None, "pt"):
            return BatchFeature({"pixel_values": pixel_values, "image_grid_thw": grid_thw})
        if return_tensors == "np":
            return BatchFeature({"pixel_values": pixel_values.numpy(), "image_grid_thw": grid_thw.numpy()})
        raise UsageError(f"return_tensors='{return_tensors}': expected 'pt' or 'np'")

    preprocess = __call__  # type: ignore[assignment]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load the paths in a (nested) list by our own rules; a URL goes the way of the base class."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        source = image_url_or_urls
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            return super().fetch_images(source)
        if isinstance(source, (str, Path, bytes)):
            rule = self.image_rule
            return load_image(
                source, max_pixels=rule.max_pixels, max_side=rule.max_side, background=rule.background, keep_grey=True
            )
        return source

    def grid_of(self, height: int, width: int, **fields: Any) -> tuple[int, int]:
        """(h, w) in patches of an image of (height, width) px, without an image."""
        return grid_of(height, width, _changed(self.image_rule, fields) if fields else self.image_rule)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of patches of an image of (height, width) px; servers call this to size their buffers."""
        fields = {key: value for key, value in (images_kwargs or {}).items() if key in _FIELDS}
        h, w = self.grid_of(height, width, **fields)
        return h * w

    def to_dict(self) -> dict[str, Any]:
        """The rule's fields (those that are None left out) and the class name, as saved."""
        fields = self.image_rule.model_dump(mode="json", exclude_none=True)
        return {**fields, "image_processor_type": type(self).__name__}


def _flat(images: Any) -> Iterator[ImageSource]:
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flat(item)
    elif isinstance(images, np.ndarray) and images.ndim == 4:  # a batch (B, H, W, C)
        yield from images
    elif images is None:
        raise ImageError("expected an image, found None; leave the images out of the call for a text-only sample")
    else:
        yield images


def _changed(rule: ImageRule | None, fields: dict[str, Any]) -> ImageRule:
    """`rule` (or the default) with some fields replaced, validated whole. Raises UsageError."""
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise UsageError(f"unknown image option '{unknown[0]}'; {nearest(unknown[0], _FIELDS)}")
    given = rule.model_dump(exclude_unset=True) if rule is not None else {}
    try:
        return ImageRule(**{**given, **fields})
    except ValidationError as error:
        raise UsageError("image rule: " + "; ".join(_messages(error))) from None


def _messages(error: ValidationError) -> Iterable[str]:
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        yield f"{field}: {message} (found {detail['input']!r})" if field else message
