"""The image processor of an Unclipped model: images in, packed patches and their grids out.

It is an ordinary transformers image processor whose settings are the fields of `ImageRule`: they stand in
`preprocessor_config.json`, can be read and set as attributes, and can be given for one call. The steps themselves are
those of `unclipped.images`; the base class's own pipeline (which checks every option of every processor on every call)
is not entered. What other processors call `do_rescale`, `image_mean` and so on is taken where the rule can express it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, Field, ValidationError
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from unclipped.core.config import FrozenConfig
from unclipped.core.errors import ImageError, UsageError, guarded, nearest
from unclipped.images.config import ImageRule
from unclipped.images.decode import image_of_array, read_header, undecoded
from unclipped.images.part import ImagePart
from unclipped.images.prepare import Item, decoded, prepare
from unclipped.images.rules import grid_of

_FIELDS = frozenset(ImageRule.model_fields)
# Keys of a saved file that describe the file and not the processing.
_SERVICE_KEYS = frozenset({"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"})
# Names that other image processors have for fields of the rule.
_SYNONYMS = {"image_mean": "mean", "image_std": "std"}
_BYTE = 1 / 255
_TIMEOUT = 30  # s without an answer
_MAX_BYTES = 1 << 28  # of an image that is fetched


def _not_zero(value: float) -> float:
    if not value:
        raise ValueError("expected another number than 0, which would make all images black")
    return value


class Switches(FrozenConfig):
    """Steps that transformers' image processors can leave out; a rule alone has them all."""

    do_convert_rgb: bool = True
    """False: an image must have the rule's number of channels already."""
    do_resize: bool = True
    """False: images keep their size, which must be a multiple of patch times merge."""
    do_rescale: bool = True
    """False: integers are not divided by 255; floats lie in 0..1 already."""
    rescale_factor: Annotated[float, Field(ge=-1e6, le=1e6), AfterValidator(_not_zero)] = _BYTE
    """What values are multiplied by before they are normalised; not 0."""
    do_normalize: bool = True
    """False: mean 0 and standard deviation 1."""


_SWITCHES = frozenset(Switches.model_fields)
_OF_CALL = ("input_data_format", "device", "return_tensors")
_OPTIONS = (*sorted(_FIELDS), *sorted(_SWITCHES), *_SYNONYMS, *_OF_CALL)

UnclippedImagesKwargs = TypedDict("UnclippedImagesKwargs", dict.fromkeys(_OPTIONS, Any), total=False)  # type: ignore[misc]
"""Every option of a call. The fields of `ImageRule` and `Switches` check their values themselves."""


class UnclippedImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (sum_patches, C*ph*pw) float32 and `image_grid_thw` (num_images, 3) int64, row-major.

    UnclippedImageProcessor(ImageRule(…)) or UnclippedImageProcessor(rule="native", patch_size=14, merge=2, …).
    Raises UsageError for an unknown or mistyped field, ImageError for an image that cannot be used.
    """

    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012 (the base class declares it so)
    valid_kwargs = UnclippedImagesKwargs
    image_rule: ImageRule
    switches: Switches

    def __init__(self, image_rule: ImageRule | None = None, **fields: Any) -> None:
        super().__init__()
        fields = {key: value for key, value in fields.items() if key not in _SERVICE_KEYS}
        self.image_rule, self.switches = image_rule or ImageRule(), Switches()
        if fields:
            self.image_rule, self.switches = self._changed(fields)

    @property
    def rescale_factor(self) -> float:  # type: ignore[override]  (the base class has an attribute of this name)
        """What values are multiplied by before they are normalised."""
        return self.switches.rescale_factor

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS or name in _SYNONYMS:
            if "image_rule" in self.__dict__:
                return getattr(self.image_rule, _SYNONYMS.get(name, name))
        elif name in _SWITCHES and "switches" in self.__dict__:
            return getattr(self.switches, name)
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIELDS or name in _SYNONYMS or name in _SWITCHES:
            # Rule and switches are immutable: make the changed ones, validated whole.
            self.image_rule, self.switches = self._changed({name: value})
        else:
            super().__setattr__(name, value)

    def __call__(  # type: ignore[override]
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        input_data_format: str | None = None,
        device: Any = None,
        **fields: Any,
    ) -> BatchFeature:
        """Decode, resize, cut and normalise.

        images: one image or a list of them, nested lists flattened in order. An image is a path, bytes, PIL image,
        `ImagePart`, or an array or tensor (H, W), (H, W, C) or (C, H, W), uint8 or float; with an axis more, a batch.
        input_data_format: `channels_first` or `channels_last`; by default the axis of 1, 3 or 4, and where both could
        be, the last one of an array and the first one of a tensor. Floats are rounded to 8 bits: they lie in 0..255,
        or in 0..1 with `do_rescale=False`.
        fields: fields of `ImageRule` and `Switches` for this call only; `size` may be {"height": …, "width": …}.
        return_tensors: "pt" (also when None) or "np". device: where the tensors go.
        Returns pixel_values float32 (sum_patches, C*ph*pw) and image_grid_thw int64 (num_images, 3).
        """
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise UsageError(f"input_data_format='{input_data_format}': expected 'channels_first' or 'channels_last'")
        fields = {key: value for key, value in fields.items() if value is not None}
        rule, switches = self._changed(fields) if fields else (self.image_rule, self.switches)
        items = [
            _prepared(source, index, rule, switches, input_data_format) for index, source in enumerate(_flat(images))
        ]
        patches = [item.patches for item in items]
        if len(patches) == 1:
            pixel_values = patches[0]
        else:
            pixel_values = torch.cat(patches) if patches else torch.empty(0, rule.patch_values)
        grids = [grid for item in items for grid in item.grids]
        grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        if return_tensors in (None, "pt"):
            if device is not None:
                with guarded(lambda reason: UsageError(f"device={device!r}: {reason}; choose cpu or leave it out")):
                    pixel_values, grid_thw = pixel_values.to(device), grid_thw.to(device)
            return BatchFeature({"pixel_values": pixel_values, "image_grid_thw": grid_thw})
        if return_tensors == "np":
            return BatchFeature({"pixel_values": pixel_values.numpy(), "image_grid_thw": grid_thw.numpy()})
        raise UsageError(f"return_tensors='{return_tensors}': expected 'pt' or 'np'")

    preprocess = __call__  # type: ignore[assignment]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open the paths and addresses in a (nested) list; what is decoded is decided by the call that they go to."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        source = image_url_or_urls
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            return undecoded(_downloaded(source), source)
        if isinstance(source, str) and source.startswith("data:"):
            return undecoded(_inline(source), "data: URI")
        return undecoded(source) if isinstance(source, (str, Path, bytes)) else source

    def grid_of(self, height: int, width: int, **fields: Any) -> tuple[int, int]:
        """(h, w) in patches of an image of (height, width) px, without an image."""
        rule, switches = self._changed(fields) if fields else (self.image_rule, self.switches)
        return grid_of(height, width, rule if switches.do_resize else _of_size(rule, height, width, "image"))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of patches of an image of (height, width) px; servers call this to size their buffers."""
        h, w = self.grid_of(height, width, **{k: v for k, v in (images_kwargs or {}).items() if k in _FIELDS})
        return h * w

    def to_dict(self) -> dict[str, Any]:
        """The rule's fields (but those that are None), switches that were changed, and the class name, as saved."""
        fields = self.image_rule.model_dump(mode="json", exclude_none=True)
        switches = self.switches.model_dump(exclude_defaults=True)
        return {**fields, **switches, "image_processor_type": type(self).__name__}

    def _changed(self, fields: dict[str, Any]) -> tuple[ImageRule, Switches]:
        """Rule and switches with some fields replaced, validated whole. Raises UsageError."""
        for_rule: dict[str, Any] = {}
        for_switches: dict[str, Any] = {}
        for given, value in fields.items():
            name = _SYNONYMS.get(given, given)
            if name in _SWITCHES:
                for_switches[name] = value
            elif name not in _FIELDS:
                raise UsageError(f"unknown image option '{given}'; {nearest(given, (*_FIELDS, *_SWITCHES))}")
            elif given != name and name in fields:
                raise UsageError(f"image options: {given} and {name} are the same field; give one")
            else:
                for_rule[name] = _pair(value) if name == "size" and isinstance(value, dict) else value
        try:
            rule, switches = self.image_rule, self.switches
            if for_rule:
                rule = ImageRule(**{**rule.model_dump(exclude_unset=True), **for_rule})
            if for_switches:
                switches = Switches(**{**switches.model_dump(exclude_unset=True), **for_switches})
        except ValidationError as error:
            raise UsageError("image rule: " + "; ".join(_messages(error))) from None
        return rule, switches


def _prepared(source: Any, index: int, rule: ImageRule, switches: Switches, layout: str | None) -> Item:
    """One image through the door, under the rule that the switches make of `rule` for it."""
    factor = switches.rescale_factor if switches.do_rescale else 1.0
    if isinstance(source, ImagePart):
        part = source
    elif isinstance(source, (torch.Tensor, np.ndarray)):
        values, name = _as_array(source), f"image {index}"
        first = _is_channels_first(values, layout, by_default=isinstance(source, torch.Tensor))
        part = ImagePart(image_of_array(values, name, factor, channels_first=first), name)
        if values.dtype != np.uint8:
            factor = _BYTE  # rescaled and rounded to bytes
    else:
        named = isinstance(source, (str, Path)) or getattr(source, "filename", None)
        part = ImagePart(source, None if named else f"image {index}")
    if not switches.do_convert_rgb:
        mode = read_header(part.source, part.label).mode
        if Image.getmodebands(mode) != rule.channels:
            raise ImageError(
                f"{part.label}: has {Image.getmodebands(mode)} channels (mode {mode}), expected {rule.channels}; leave "
                "do_convert_rgb=False out"
            )
    if not switches.do_resize:
        image = decoded(part, rule)
        part, rule = ImagePart(image, part.label), _of_size(rule, image.height, image.width, part.label)
    if not switches.do_normalize:
        rule = rule.model_copy(update={"mean": (0.0,) * rule.channels, "std": (1.0,) * rule.channels})
    if factor != _BYTE:  # x*factor for x/255, in the numbers of the rule
        scale = 255 * factor
        rule = rule.model_copy(
            update={name: tuple(number / scale for number in getattr(rule, name)) for name in ("mean", "std")}
        )
    return prepare(part, rule)


def _of_size(rule: ImageRule, height: int, width: int, name: str) -> ImageRule:
    """`rule` for an image that keeps its size. Raises ImageError when blocks do not fill it."""
    rows, columns = rule.block
    if height % rows or width % columns:
        raise ImageError(
            f"{name}: {height}x{width} px (height x width) with do_resize=False: expected multiples of {rows}x"
            f"{columns} px (patch times merge); resize it or leave do_resize=False out"
        )
    kept = rule.model_dump(include={"patch_size", "merge", "mean", "std", "channels", "max_pixels", "max_side"})
    return ImageRule(**{**kept, "rule": "squash", "size": (height, width)})


def _as_array(values: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _is_channels_first(values: np.ndarray, layout: str | None, *, by_default: bool) -> bool:
    if layout is not None:
        return layout == "channels_first"
    if values.ndim != 3:
        return False
    first, last = values.shape[0] in (1, 3, 4), values.shape[2] in (1, 3, 4)
    return by_default if first and last else first


def _pair(size: dict[str, Any]) -> tuple[Any, Any]:
    if set(size) != {"height", "width"}:
        raise UsageError(f"image rule: size: expected 'height' and 'width', found {sorted(size)}; give these two")
    return size["height"], size["width"]


def _downloaded(address: str) -> bytes:
    from urllib.request import urlopen

    with (
        guarded(lambda reason: ImageError(f"{address}: cannot be fetched ({reason}); download it first")),
        urlopen(address, timeout=_TIMEOUT) as answer,
    ):
        content = answer.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ImageError(f"{address}: more than {_MAX_BYTES:,} bytes; download and shrink it first")
    return content


def _inline(address: str) -> bytes:
    header, comma, body = address.partition(",")
    try:
        if not comma or not header.endswith(";base64"):
            raise binascii.Error
        return base64.b64decode(body, validate=True)
    except ValueError:  # binascii.Error is one
        raise ImageError(
            f"data: URI: expected data:image/…;base64,…, found {address[:40]!r}; encode it again"
        ) from None


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flat(item)
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:  # a batch
        yield from images
    elif images is None:
        raise ImageError("expected an image, found None; leave the images out of the call for a text-only sample")
    else:
        yield images


def _messages(error: ValidationError) -> Iterable[str]:
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        yield f"{field}: {message} (found {detail['input']!r})" if field else message
