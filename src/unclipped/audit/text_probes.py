"""Zero-shot classification and retrieval with the text side that pretraining on pairs saved beside an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from unclipped.audit.config import (
    GENERATED_TEST,
    EncoderEvaluationConfig,
    RetrievalConfig,
    ZeroShotConfig,
)
from unclipped.audit.data import LabelledSet
from unclipped.audit.features import Kind, digests_of, extract, grid_of_rule, weights_digest
from unclipped.audit.results import ARM_NAMES, RETRIEVAL, Measurement, shown
from unclipped.audit.zero_shot import (
    class_weights,
    encode_texts,
    recall_at_k,
    zero_shot_predict,
)
from unclipped.core.documents import read_text
from unclipped.core.errors import DataError, UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.pairs import pair_of
from unclipped.data.sample import ImagePart
from unclipped.data.sources import expanded, open_source
from unclipped.evaluation.figures import ACCURACY, RECALL, Difference
from unclipped.evaluation.intervals import estimate, paired_difference
from unclipped.images.patches import unpatchify
from unclipped.objectives.text_side import TEXT_SIDE, TextSide, load_text_side
from unclipped.training.device import choose_device

MAJORITY = "majority"


@dataclass(frozen=True)
class CaptionedSet:
    """Images, each once, and captions with the number of the image that each describes."""

    name: str
    images: tuple[ImagePart, ...]
    digests: tuple[str, ...]
    captions: tuple[str, ...]
    image_of_caption: tuple[int, ...]

    @property
    def captions_of_several_images(self) -> int:
        """How many captions stand, word for word, beside another image too."""
        owners: dict[str, set[int]] = {}
        for caption, image in zip(self.captions, self.image_of_caption, strict=True):
            owners.setdefault(caption, set()).add(image)
        return sum(len(owners[caption]) > 1 for caption in self.captions)


def load_captioned(config: RetrievalConfig) -> CaptionedSet:
    """The split's pairs; images of equal content are one. Raises DataError for samples that are no pairs, too large k.

    Raises UsageError and DataError as `open_source` does.
    """
    limit = config.limit
    if limit is None and config.source.startswith("generated:"):
        limit = GENERATED_TEST
    source = open_source(
        SourceConfig(source=config.source, split=config.split, limit=limit, options=config.options), seed=config.seed
    )
    pairs = [pair_of(source[index]) for index in range(source.length or 0)]
    digests = digests_of([image for image, _ in pairs])
    numbers: dict[str, int] = {}
    owners = tuple(numbers.setdefault(found, len(numbers)) for found in digests)
    firsts = tuple(pairs[digests.index(found)][0] for found in numbers)
    if max(config.k) > len(firsts):
        raise DataError(
            f"retrieval {config.source}, {config.split} split: k {max(config.k)} of {len(firsts)} different images; "
            "lower retrieval.k or add images"
        )
    return CaptionedSet(config.source, firsts, tuple(numbers), tuple(caption for _, caption in pairs), owners)


def names_of(file: str, data: LabelledSet) -> dict[str, str]:
    """The first name of each class in a file of lines `label name, more names`.

    Raises DataError for a missing file, a line without a name, and a class that the file does not name.
    """
    given = expanded(file, "zero_shot.names_file")
    candidates = [Path(expanded(data.name, "data")) / given, Path(given)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise DataError(
            f"zero_shot.names_file {file}: no such file, neither in {data.name} nor as a path of its own; it holds a "
            "line `label name, more names` for every class"
        )
    names = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        label, *rest = line.split(maxsplit=1)
        name = rest[0].split(",")[0].strip() if rest else ""
        if not name:
            raise DataError(f"{path}, line {number}: expected a label and a name, found {line.strip()!r}")
        names[label] = name
    if missing := [label for label in data.classes if label not in names]:
        raise DataError(
            f"{path}: no line for class {missing[0]!r} of {data.name}; add it, or name it in zero_shot.names"
        )
    return names


class TextSideExtractor:
    """Embeddings of images in the space that they share with texts, under the rule that the pair was trained with."""

    def __init__(self, side: TextSide) -> None:
        self.side, self.rule = side, side.rule
        self.fingerprint = f"{TEXT_SIDE} {weights_digest(side.model)}"

    def __call__(self, patches: Tensor, kind: Kind) -> dict[str, Tensor]:
        """patches (B, n, C·ph·pw) → {"pooled": (B, 1, D)}; there is no embedding of a single patch."""
        if kind != "pooled":
            raise UsageError(f"features: a text side embeds whole images only, found kind {kind}")
        planes = unpatchify(patches, grid_of_rule(self.rule), self.rule.patch_size, self.rule.channels)  # (B, C, H, W)
        return {"pooled": self.side.encode_images(planes)[:, None].cpu()}


class TextProbes:
    """Both text probes on the encoder's text side and on one of random weights, and what was measured so far.

    Raises UsageError for an encoder that was saved without a text side.
    """

    def __init__(self, config: EncoderEvaluationConfig, output: Path, console: Console) -> None:
        self.config, self.console = config, console
        self.folder = output / "features" if config.cache is None else Path(config.cache)
        if not (Path(config.encoder) / TEXT_SIDE).is_dir():
            raise UsageError(
                f"{config.encoder}: zero_shot and retrieval need an encoder folder with a text side ({TEXT_SIDE}), "
                "which this has not; take one pretrained with objective contrastive, sigmoid or coca, or leave both out"
            )
        device = choose_device(config.device)
        self.sides = {"encoder": load_text_side(config.encoder).to(device)}
        if "random_weights" in config.compare:
            self.sides["random_weights"] = load_text_side(config.encoder, random_seed=config.random_seed).to(device)
        self.measurements: list[Measurement] = []
        self.differences: dict[str, dict[str, Difference]] = {}
        self.predictions: list[dict[str, Any]] = []
        self.intervals = {"samples": config.bootstrap_samples, "confidence": config.confidence, "seed": config.seed}

    def _embedded(self, arm: str, images: list[ImagePart], digests: list[str], title: str) -> Tensor:
        """Embeddings (N, D) of images."""
        return extract(
            TextSideExtractor(self.sides[arm]),
            images,
            digests,
            self.folder,
            batch_size=self.config.batch_size,
            title=f"{ARM_NAMES[arm]}, {title}",
            console=self.console,
        )["pooled"][:, 0]

    def name_classes(self, data: LabelledSet, config: ZeroShotConfig) -> None:
        """Classify the test images by their class names. Raises UsageError for names of classes that are not there."""
        if unknown := sorted(config.names.keys() - set(data.classes)):
            raise UsageError(
                f"zero_shot.names: {unknown[0]!r} is no class of {data.name}; its classes are "
                f"{', '.join(data.classes[:5])}{', …' if len(data.classes) > 5 else ''}"
            )
        listed = {} if config.names_file is None else names_of(config.names_file, data)
        names = [config.names.get(label, listed.get(label, label)) for label in data.classes]
        images = [item.image for item in data.test]
        digests = digests_of(images)
        labels = np.array([item.label for item in data.test])
        predicted: dict[str, np.ndarray] = {}
        for arm, side in self.sides.items():
            weights = class_weights(side, names, config.templates).cpu()  # (C, D)
            predicted[arm] = zero_shot_predict(self._embedded(arm, images, digests, "test images"), weights).numpy()
        majority = int(np.bincount([item.label for item in data.train]).argmax())
        predicted[MAJORITY] = np.full(len(labels), majority)
        right = {arm: (classes == labels).astype(np.float64) for arm, classes in predicted.items()}
        for arm, hits in right.items():
            parts = {
                name: float(hits[labels == number].mean())
                for number, name in enumerate(data.classes)
                if (labels == number).any()
            }
            value = estimate(hits, is_binary=True, metric=ACCURACY, **self.intervals)
            self.measurements.append(Measurement("zero_shot", arm, value, parts=parts))
            self.predictions += [
                {"probe": "zero_shot", "features": arm, "id": item.id, "label": data.classes[item.label],
                 "predicted": data.classes[int(found)]}
                for item, found in zip(data.test, predicted[arm], strict=True)
            ]  # fmt: skip
        self.differences["zero_shot"] = {
            arm: paired_difference(right["encoder"], hits, metric=ACCURACY, **self.intervals)
            for arm, hits in right.items()
            if arm != "encoder"
        }

    def retrieve(self, data: CaptionedSet, config: RetrievalConfig) -> dict[str, Any]:
        """Recall at k both ways, intervals over images: captions of one image are drawn together. → facts."""
        owners = list(data.image_of_caption)
        found = {
            arm: recall_at_k(
                self._embedded(arm, list(data.images), list(data.digests), "images to retrieve"),
                encode_texts(side, data.captions).cpu(),
                owners,
                config.k,
            )
            for arm, side in self.sides.items()
        }
        for way, clusters in (("image_to_text", None), ("text_to_image", owners)):
            for k in config.k:
                probe = f"{RETRIEVAL}{way}_at_{k}"
                for arm, hits in found.items():
                    value = estimate(hits[way][k], None, clusters, is_binary=True, metric=RECALL, **self.intervals)
                    self.measurements.append(Measurement(probe, arm, value))
                self.differences[probe] = {
                    arm: paired_difference(
                        found["encoder"][way][k], hits[way][k], None, clusters, metric=RECALL, **self.intervals
                    )
                    for arm, hits in found.items()
                    if arm != "encoder"
                }
        return {
            "source": shown(data.name),
            "images": len(data.images),
            "captions": len(data.captions),
            "captions_of_several_images": data.captions_of_several_images,
        }
