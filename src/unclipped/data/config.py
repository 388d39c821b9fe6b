"""What a recipe says about data: sources, how they are mixed, and what is done to a sample before it is encoded."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from unclipped.core.bounded import bounded
from unclipped.core.config import (
    Count,
    Decay,
    FrozenConfig,
    Name,
    Number,
    OpenShare,
    Options,
    PathText,
    Seed,
    Share,
    Whole,
)
from unclipped.core.errors import UsageError, first_line

MAX_PANELS = 100
Words = Annotated[tuple[Name, ...], Field(max_length=1000)]
Aspect = Annotated[Number, Field(ge=0, le=1_000_000)]


class PartConfig(FrozenConfig):
    """A part cut from a split by the hash of a key, so that choices are made on data that no report uses."""

    share: OpenShare
    """Share of the keys that fall on the `dev` side."""
    side: Literal["train", "dev"]
    """Which side this source yields. Both sides together are the whole split, and no key is on both."""
    by: Literal["cluster", "image", "sample"] = "cluster"
    """Key that is never split: the cluster (see `SourceConfig.cluster`), the image, or the sample id."""
    seed: Seed = 0
    """Another seed cuts another part."""


class PermutePanels(FrozenConfig):
    """Permute side-by-side panels of the image and the words that name them."""

    kind: Literal["permute_panels"] = "permute_panels"
    panels: Annotated[tuple[tuple[Share, Share], ...], Field(max_length=MAX_PANELS)]
    """Left and right edge of each panel as fractions of the image width; all of one width, left to right."""
    names: Words
    """The word for each panel, left to right, as whole words of question and answer."""
    unsafe: Words = ("leftmost", "rightmost", "left of", "right of", "next to", "between", "first", "last")
    """A sample whose text holds one of these keeps its image: its meaning may change with the order of the panels."""
    probability: Share = 1.0
    """Share of samples that are permuted (the identity is one of the permutations)."""

    @model_validator(mode="after")
    def _panels_fit(self) -> PermutePanels:
        if len(self.panels) != len(self.names) or len(self.panels) < 2:
            raise ValueError(
                f"expected one name for each of at least two panels, found {len(self.names)} names "
                f"for {len(self.panels)} panels"
            )
        edges = [edge for panel in self.panels for edge in panel]
        if edges != sorted(edges) or edges[0] < 0 or edges[-1] > 1:
            raise ValueError("panels must lie left to right inside 0..1 without overlap")
        widths = [right - left for left, right in self.panels]
        if max(widths) - min(widths) > 1e-6:
            raise ValueError(f"panels must have equal widths, found {widths}")
        return self


class MirrorPanels(FrozenConfig):
    """Flip the whole image left to right and swap the words in pairs."""

    kind: Literal["mirror_panels"] = "mirror_panels"
    swap: Annotated[tuple[tuple[Name, Name], ...], Field(max_length=1000)] = (
        ("left", "right"),
        ("leftmost", "rightmost"),
    )
    """Pairs of whole words that trade places in question and answer."""
    unsafe: Words = ()
    """A sample whose text holds one of these keeps its image."""
    probability: Share = 0.5
    """Share of samples that are mirrored."""


class Geometric(FrozenConfig):
    """Scale and shift the image a little; the uncovered border takes the colour of the image's own border."""

    kind: Literal["geometric"] = "geometric"
    scale: Decay = 0.15
    """Largest change of width and height (drawn apart), as a fraction."""
    shift: Annotated[Whole, Field(ge=0, le=1000)] = 3
    """Largest shift in each direction, in pixels."""


class Photometric(FrozenConfig):
    """Change contrast and brightness and add noise, all on values in 0..1."""

    kind: Literal["photometric"] = "photometric"
    contrast: Decay = 0.3
    """Contrast about the mean is multiplied by 1 ± this."""
    brightness: Decay = 0.1
    """Added to every value: ± this."""
    noise: Share = 0.02
    """Standard deviation of Gaussian noise is drawn between 0 and this."""


class RandomCrop(FrozenConfig):
    """Crop a random window and, optionally, flip it left to right: for photographs."""

    kind: Literal["random_crop"] = "random_crop"
    minimum_area: Annotated[Share, Field(gt=0)] = 0.5
    """Smallest share of the image's area that is kept."""
    aspect: Annotated[Number, Field(ge=1, le=1000)] = 1.33
    """Largest change of the aspect ratio."""
    flip: bool = True
    """Flip half of the images; leave off where left and right carry meaning."""


AugmentStep = Annotated[
    PermutePanels | MirrorPanels | Geometric | Photometric | RandomCrop, Field(discriminator="kind")
]


class AugmentConfig(FrozenConfig):
    """Changes made to training samples, in order; each is a pure function of the seed and the sample's index."""

    steps: Annotated[tuple[AugmentStep, ...], Field(max_length=100)] = ()
    """Applied one after the other."""


class TextRichFilter(FrozenConfig):
    """Keep samples whose images show much text, as a small detector of letters that comes with the package scores them.

    Every image is scored once and the scores are kept in the cache folder.
    """

    kind: Literal["text_rich"] = "text_rich"
    threshold: Share | None = None
    """Least score that is kept, 0 to 1; null: 0.5, unless `share` is set."""
    share: Annotated[Share, Field(gt=0)] | None = None
    """Keep this share of the source's images, those of the highest scores: 0.503 and 0.013 are the light and the heavy
    filter of the Web-SSL study."""

    @model_validator(mode="after")
    def _one_of_two(self) -> TextRichFilter:
        if self.threshold is not None and self.share is not None:
            raise ValueError("threshold and share are both set; the share says where the threshold lies: leave one out")
        return self


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Filter = Annotated[TextRichFilter, BeforeValidator(_named)]
"""A filter, or its name for the settings it has by itself."""


class SourceConfig(FrozenConfig):
    """One place that samples come from."""

    source: PathText
    """`generated:NAME`, or a file or folder; with format `text` also a pattern such as `texts/*.gz`, for tar shards
    also one such as `data-{000..099}.tar`. `$NAME` is an environment variable. In a folder, `<split>.jsonl` (or .json,
    .parquet) is taken; a folder of images without such a file is read image by image."""
    format: Literal["auto", "llava", "sharegpt", "cambrian", "qa", "pairs", "parquet", "text", "images", "tar"] = "auto"
    """Format of the file or folder; `auto` looks at the content. `images`: every image file of a folder, alone."""
    split: Name = "train"
    """Split of a folder or of a generated task."""
    images: PathText | None = None
    """Folder that image paths are relative to; by default the folder of the data file."""
    weight: Annotated[Number, Field(gt=0, le=1_000_000)] = 1.0
    """Share of draws in a mixture, relative to the other sources' weights."""
    limit: Count | None = None
    """Use only the first so many samples (after `part`)."""
    cluster: Annotated[str, Field(max_length=1000)] | None = None
    """Regular expression with one group, searched in the sample id: the group is the cluster of related samples, as in
    `sroie-line-(\\d+)-` for lines of one receipt."""
    aspect: tuple[Aspect, Aspect] | None = None
    """Use only samples whose images all have width / height within [lowest, highest]: short text lines first, say."""
    part: PartConfig | None = None
    """Take only one side of a split cut by hash."""
    filter: Filter | None = None
    """Keep some of the samples by what their images show, after `limit`; in place of the filter of `data`. `text_rich`
    is short for {kind: text_rich}. An endless source needs a `limit`."""
    augment: AugmentConfig | None = None
    """Augmentation of this source alone, in place of the mixture's."""
    options: Options = Field(default_factory=dict)
    """Options of the generated task or of the reader (see the reader's description)."""

    @field_validator("cluster")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            with bounded("cluster", memory=None, error=UsageError):
                groups = re.compile(value).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"not a regular expression: {first_line(error)}") from None
        if groups != 1:
            raise ValueError(f"expected a regular expression with exactly one group, found {groups}")
        return value


class DataConfig(FrozenConfig):
    """The `data` section of a recipe: a weighted mixture of sources."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1, max_length=10_000)]
    """Where samples come from."""
    share_image: bool = False
    """Put the questions about one image in one row behind a single copy of the image, unseen by each other."""
    max_group: Annotated[Whole, Field(gt=0, le=10_000)] | None = None
    """With `share_image`, the most questions in one row; an image with more gives several rows."""
    blind: Literal["removed", "blank"] | None = None
    """The baseline that can only guess: images taken out of every sample, or replaced by one of the mean colour."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """`skip` logs and counts a sample that cannot be used and takes the next in its place."""
    augment: AugmentConfig | None = None
    """Augmentation of every source that has none of its own."""
    filter: Filter | None = None
    """Filter of every source that has none of its own, each by itself: a share is one of each source."""
    seed: Seed | None = None
    """Seed of order and augmentation; None takes the run's seed."""
