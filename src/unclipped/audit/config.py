"""What is asked of an encoder, as data: which images, which probes, which comparisons. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unclipped.core.config import (
    BatchSize,
    Count,
    Decay,
    FrozenConfig,
    Name,
    Number,
    OpenShare,
    Options,
    PatchSide,
    PathText,
    Pixels,
    Rate,
    Resamples,
    Seed,
    Share,
    Whole,
)
from unclipped.data.views_config import Area, Aspect, ColourConfig, ViewConfig

Probe = Literal["knn", "linear"]
Arm = Literal["random_weights", "raw_pixels"]
WeightDecay = Annotated[Number, Field(ge=0, le=1000)]
Template = Annotated[str, Field(max_length=1000)]

PLAIN_TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.", "an image of the {}.")
GENERATED_TRAIN, GENERATED_TEST = 2000, 500
"""Images drawn from an endless source whose limits are not set."""


class LabelledDataConfig(FrozenConfig):
    """Images with one label each: a folder of class folders, question files whose answer is the label, or generated."""

    source: PathText
    """A folder `<split>/<class>/image.png`; parquet files or a saved data set with a column of images and one of
    labels; a folder or file of questions with one and the same question, whose answer is the label; or a generated
    task: `generated:shapes`, labelled by the largest figure, or any that asks one and the same question. `$NAME` is an
    environment variable."""
    train_split: Name = "train"
    """Split that heads are trained on and that neighbours come from."""
    test_split: Name = "test"
    """Split that is reported, and used for nothing else."""
    label: Literal["auto", "answer", "category", "figure", "colour", "position"] = "auto"
    """What is the label of a question file or a generated image. figure and colour are those of the largest shape of
    `generated:shapes`; position is the ninth of the image (3 x 3) that the middle of that shape lies in. `auto`: the
    class where images are labelled, the figure of generated shapes, the answer elsewhere."""
    train_limit: Count | None = None
    """Only the first so many images of the train split (2,000 of an endless source)."""
    test_limit: Count | None = None
    """Only the first so many images of the test split (500 of an endless source)."""
    seed: Seed = 0
    """Seed of generated images."""
    options: Options = Field(default_factory=dict)
    """Options of the generated task or of the reader."""


class KnnConfig(FrozenConfig):
    """Neighbours by cosine similarity, each voting with exp(similarity / temperature)."""

    k: Annotated[tuple[Count, ...], Field(max_length=100)] = (10, 20, 50, 100)
    """Numbers of neighbours that are tried; the one best on the development part is reported."""
    temperature: Rate = 0.07
    """Divides similarities; the smaller, the more the nearest neighbours count."""

    @field_validator("k")
    @classmethod
    def _some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("expected at least one number of neighbours, each once")
        return value


class LinearConfig(FrozenConfig):
    """A grid of linear heads trained together; the one best on the development part is reported."""

    learning_rates: Annotated[tuple[Rate, ...], Field(max_length=100)] = (
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0,
    )  # fmt: skip
    """Learning rates for a batch of 256; each is multiplied by batch_size / 256. The first thirteen are DINOv2's, whose
    schedule is ten times as long."""
    blocks: Annotated[tuple[Literal[1, 4], ...], Field(max_length=2)] = (1, 4)
    """Pooled features of the last block, and of the last four side by side."""
    mean_patch: Annotated[tuple[bool, ...], Field(max_length=2)] = (False, True)
    """Without and with the mean of the last patch features beside them."""
    steps: Count = 1250
    """Steps of stochastic gradient descent; the learning rates fall to zero along a cosine."""
    batch_size: BatchSize = 256
    """Images a step."""
    momentum: Decay = 0.9
    """Momentum of the descent."""
    seed: Seed = 0
    """Seed of the order of the images."""

    @model_validator(mode="after")
    def _some(self) -> LinearConfig:
        for name in ("learning_rates", "blocks", "mean_patch"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected at least one value, each once")
        return self


class TrainingViews(FrozenConfig):
    """Random views of the images that fine-tuning learns from; images that are measured stay whole."""

    scale: tuple[Area, Area] = (0.35, 1.0)
    """Smallest and largest share of the image's area in the window."""
    aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Smallest and largest width of the window divided by its height."""
    mirror: Share = 0.5
    """Probability that left and right change places; 0 where they carry meaning."""
    colours: ColourConfig | None = None
    """Changes of colour; null: none."""

    @model_validator(mode="after")
    def _is_a_view(self) -> TrainingViews:
        self.of_size(1)  # raises for what no view can be
        return self

    def of_size(self, size: int) -> ViewConfig:
        """The view of `size` px a side."""
        return ViewConfig(size=size, **dict(self))


class FineTuningConfig(FrozenConfig):
    """The whole encoder and a linear head trained by AdamW, lower blocks more slowly than upper ones."""

    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=100)] = (1e-4, 3e-4, 1e-3)
    """Learning rates of the head and the last norm that are tried; the one best on the development part is reported."""
    layer_decay: Annotated[Share, Field(gt=0)] = 0.75
    """Factor on the learning rate for each block further down: that of block i of L is decay^(L + 1 - i) of the head's,
    that of patch embedding and positions decay^(L + 1)."""
    steps: Count = 500
    """Training steps for each learning rate."""
    batch_size: BatchSize = 32
    """Images a step."""
    warmup_share: Decay = 0.1
    """Share of the steps in which learning rates rise linearly; they fall to zero along a cosine afterwards."""
    weight_decay: WeightDecay = 0.05
    """Decoupled weight decay of matrices (norms, biases: none)."""
    clip_norm: Rate | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    augment: TrainingViews | None = None
    """Random views of the training images; null: whole images."""
    seed: Seed = 0
    """Seed of the order of the images, of their views and of dropout."""

    @field_validator("learning_rates")
    @classmethod
    def _once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) != len(value):
            raise ValueError("expected each learning rate once")
        return value


class SegmentationConfig(FrozenConfig):
    """Images with a class for each pixel, and the head (batch normalisation and a 1x1 convolution) that reads them."""

    source: PathText = "generated:shapes"
    """`generated:NAME` of a task with images, or a folder of images and of masks, PNG of the same name, whose grey
    values are the numbers of the classes. `$NAME` is an environment variable."""
    layout: Literal["auto", "split_folders", "kind_folders", "ade20k"] = "auto"
    """Where a folder holds them. `split_folders`: `<split>/images`, `<split>/masks`. `kind_folders`: `images/<split>`,
    `masks/<split>` or `annotations/<split>`. `ade20k`: as ADEChallengeData2016 comes, `images/training`,
    `annotations/training` and the same of `validation`; 0 is ignored, 1 to 150 are classes. `auto`: looks."""
    classes: Annotated[tuple[Name, ...], Field(max_length=256)] = ()
    """Names of the classes of a folder in the order of their numbers; generated tasks bring theirs, the kinds of their
    objects, `ade20k` takes those of its `objectInfo150.txt`, or else numbers."""
    first_class: Annotated[Whole, Field(ge=0, le=254)] = 0
    """Mask value of the first class."""
    ignore: Annotated[Whole, Field(ge=0, le=255)] = 255
    """Mask value of pixels that are neither trained on nor scored."""
    train_split: Name = "train"
    """Split that the head is trained on; in `ade20k`, `train` is its folder `training`."""
    test_split: Name = "test"
    """Split that is reported; in `ade20k`, `test` is its folder `validation`."""
    train_limit: Count | None = None
    """Only the first so many images of the train split (2,000 of an endless source)."""
    test_limit: Count | None = None
    """Only the first so many images of the test split (500 of an endless source)."""
    options: Options = Field(default_factory=dict)
    """Options of the generated task."""
    learning_rate: Rate = 1e-2
    """Learning rate of AdamW, falling to zero along a cosine."""
    weight_decay: WeightDecay = 1e-4
    """Weight decay of AdamW."""
    steps: Count = 1000
    """Training steps."""
    batch_size: BatchSize = 16
    """Images a step."""
    seed: Seed = 0
    """Seed of the order of the images, of the head's first values and of generated images."""


class ZeroShotConfig(FrozenConfig):
    """Classes of `data` by the similarity of an image with prompts that name them; nothing is trained."""

    templates: Annotated[tuple[Template, ...], Field(min_length=1, max_length=1000)] = PLAIN_TEMPLATES
    """Prompts; `{}` is where the name of the class goes. A class is the mean of its prompts' unit vectors."""
    names: Annotated[dict[str, Name], Field(max_length=100_000)] = Field(default_factory=dict)
    """Words for classes whose label is none, such as {n01440764: tench}; other classes are called by their label."""
    names_file: str | None = None
    """Text file with a line `label name, more names` for every class, such as ImageNet's LOC_synset_mapping.txt; the
    first name is taken. A relative path is looked for in the folder of `data` first. `names` win over it."""

    @field_validator("templates")
    @classmethod
    def _one_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r}: expected exactly one {{}}, where the name of the class goes")
        return value


class RetrievalConfig(FrozenConfig):
    """Images with captions, each to be found from the other."""

    source: PathText
    """A folder or file of one-image questions whose answer is the caption, as pretraining on pairs reads them; several
    rows about one image are captions of it. `$NAME` is an environment variable."""
    split: Name = "test"
    """Split that is reported."""
    limit: Count | None = None
    """Only the first so many pairs."""
    k: Annotated[tuple[Count, ...], Field(min_length=1, max_length=100)] = (1, 5, 10)
    """Numbers of candidates among which the right one counts as found."""
    options: Options = Field(default_factory=dict)
    """Options of the generated task or of the reader."""
    seed: Seed = 0
    """Seed of generated images."""


class EncoderEvaluationConfig(FrozenConfig):
    """One encoder, the probes put to it, and what it is compared with."""

    encoder: PathText
    """Checkpoint folder, hub id, or `llm:` and either of them."""
    baseline: bool = False
    """Declare an encoder that was trained by comparing images with text as a baseline."""
    patch_size: PatchSide | None = None
    """Patch in px of an `llm:` encoder; others bring theirs."""
    image_size: Pixels | None = None
    """Height and width in px of every image, a multiple of the patch. None: the size the encoder was made for."""
    resize: Literal["squash", "crop", "pad"] = "squash"
    """How an image gets that size: aspect given up, centre cut out, or border added."""
    data: LabelledDataConfig | None = None
    """Labelled images for the k-NN and linear probes."""
    probes: Annotated[tuple[Probe, ...], Field(max_length=2)] = ("knn", "linear")
    """Probes on `data`."""
    knn: KnnConfig = KnnConfig()
    """Settings of the k-NN probe."""
    linear: LinearConfig = LinearConfig()
    """Settings of the linear probe."""
    fine_tuning: FineTuningConfig | None = None
    """Training the whole encoder on the labels of `data`; None: left out."""
    segmentation: SegmentationConfig | None = None
    """Images with masks for the segmentation probe; None: left out."""
    zero_shot: ZeroShotConfig | None = None
    """Naming the classes of `data`, for an encoder saved with its text side; None: left out."""
    retrieval: RetrievalConfig | None = None
    """Finding images and captions, for an encoder saved with its text side; None: left out."""
    compare: Annotated[tuple[Arm, ...], Field(max_length=2)] = ("random_weights", "raw_pixels")
    """What the encoder is compared with on the same items: its architecture with fresh weights, and plain pixels."""
    random_seed: Seed = 0
    """Seed of the fresh weights."""
    raw_size: Pixels = 32
    """Height and width in px that raw pixels are reduced to."""
    dev_share: OpenShare = 0.2
    """Share of each class of the train split on which settings are chosen."""
    batch_size: BatchSize = 64
    """Images encoded together."""
    cache: PathText | None = None
    """Folder of extracted features, shared between runs. None: `features` in the run folder."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the encoder runs."""
    bootstrap_samples: Resamples = 2000
    """Number of bootstrap resamples."""
    confidence: OpenShare = 0.95
    """Coverage of the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap and of the development part."""

    @model_validator(mode="after")
    def _something_to_do(self) -> EncoderEvaluationConfig:
        if self.data is None and self.segmentation is None and self.retrieval is None:
            raise ValueError("nothing to measure: give data (labelled images), segmentation, retrieval, or several")
        if self.data is not None and not self.probes and self.zero_shot is None and self.fine_tuning is None:
            raise ValueError(
                "probes: data is given but no probe; expected knn, linear or both, or fine_tuning, or zero_shot"
            )
        for name in ("zero_shot", "fine_tuning"):
            if getattr(self, name) is not None and self.data is None:
                raise ValueError(f"{name}: its classes and images are those of data, which is missing")
        if self.segmentation is not None and self.resize != "squash":
            raise ValueError("segmentation needs resize: squash, so that masks and images are cut alike")
        return self
