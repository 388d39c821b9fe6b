"""Evaluate an encoder: features once, then every probe, on the encoder and on what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from unclipped.audit.config import EncoderEvaluationConfig, FineTuningConfig, SegmentationConfig
from unclipped.audit.data import LabelledSet, cut_development, load_labelled
from unclipped.audit.features import (
    WORKERS,
    EncoderExtractor,
    Extractor,
    Kind,
    RawPixels,
    digests_of,
    extract,
    grid_of_rule,
    probe_rule,
    random_weights,
    raw_rule,
)
from unclipped.audit.fine_tuning import fine_tune, task_of
from unclipped.audit.knn import knn_predict
from unclipped.audit.linear import grid_of_heads, linear_probe, side_by_side
from unclipped.audit.masks import SegmentedSet, check_masks, load_segmented, masks_at
from unclipped.audit.results import (
    ARM_NAMES,
    EncoderResults,
    Measurement,
    remarks,
    results_table,
    shown,
    write_results,
)
from unclipped.audit.segmentation import (
    Overlaps,
    iou_difference,
    iou_estimate,
    mean_iou,
    measure_overlaps,
    train_segmenter,
)
from unclipped.audit.text_probes import TextProbes, load_captioned
from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import write_text
from unclipped.data.sample import ImagePart
from unclipped.encoders.base import VisionEncoder
from unclipped.encoders.build import load_encoder
from unclipped.encoders.source import LLM_PREFIX
from unclipped.evaluation.figures import ACCURACY, Difference
from unclipped.evaluation.intervals import estimate, paired_difference
from unclipped.images.config import ImageRule
from unclipped.training.device import choose_device

PREDICTIONS_FILE = "predictions.jsonl"
FINE_TUNING_FOLDER = "fine-tuning"

Features = dict[str, Tensor]
Outcome = tuple[Tensor, str, dict[str, float]]
"""Classes of the test images, the setting that was chosen, accuracy of every setting on the development part."""


def evaluate_encoder(
    config: EncoderEvaluationConfig, output: str | Path, *, console: Console | None = None
) -> EncoderResults:
    """Measure the encoder of `config`; OUTPUT gets results.json, report.md, predictions.jsonl and the features.

    Features (see `features.extract`) and finished fine-tunings that are there already are taken over, so the call may
    be repeated after an interruption. Raises CheckpointError for an encoder that does not load, DataError and
    ImageError for data that cannot be used, UsageError for settings that do not fit the encoder.
    """
    output, console = Path(output), console or Console()
    labelled = None if config.data is None else load_labelled(config.data)
    segmented = None if config.segmentation is None else load_segmented(config.segmentation)
    captioned = None if config.retrieval is None else load_captioned(config.retrieval)
    encoder = open_encoder(config)
    asks_text = config.zero_shot is not None or captioned is not None
    text = TextProbes(config, output, console) if asks_text else None
    evaluation = _Evaluation(config, encoder, output, console)
    data: dict[str, Any] = {}
    if labelled is not None:
        data["labelled"] = evaluation.probe_labels(labelled)
    if segmented is not None and config.segmentation is not None:
        data["segmentation"] = evaluation.segment(segmented, config.segmentation)
    if text is not None:
        if labelled is not None and config.zero_shot is not None:
            text.name_classes(labelled, config.zero_shot)
        if captioned is not None and config.retrieval is not None:
            data["retrieval"] = text.retrieve(captioned, config.retrieval)
        evaluation.predictions += text.predictions
        evaluation.measurements += text.measurements
        evaluation.differences |= text.differences
    facts = {
        "source": shown(config.encoder),
        "family": encoder.spec.family,
        "objective": encoder.spec.objective,
        "parameters": sum(tensor.numel() for tensor in encoder.model.state_dict().values()),
        "image_size": list(evaluation.rule.size or ()),
        "patch_size": list(evaluation.rule.patch_size),
    }
    results = EncoderResults(facts, data, tuple(evaluation.measurements), evaluation.differences)
    if labelled is not None:
        lines = [json.dumps(row, ensure_ascii=False) for row in evaluation.predictions]
        write_text(output / PREDICTIONS_FILE, "".join(f"{line}\n" for line in lines))
    write_results(results, config, output)
    console.print(results_table(results))
    for remark in remarks(results, config):
        console.print(remark, markup=False, soft_wrap=True)
    return results


def open_encoder(config: EncoderEvaluationConfig) -> VisionEncoder:
    """The encoder of the configuration, in evaluation mode. Raises CheckpointError and UsageError as `load_encoder`."""
    options: dict[str, Any] = {}
    if config.patch_size is not None:
        if not config.encoder.startswith(LLM_PREFIX):
            raise UsageError(f"patch_size: only for encoders made of a language model ({LLM_PREFIX}{config.encoder})")
        options["patch_size"] = config.patch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.random_seed)  # the patch stem of an llm: encoder is new
        return load_encoder(config.encoder, baseline=config.baseline, **options)[0]


class _Evaluation:
    """The arms of one evaluation, and what was measured so far."""

    def __init__(self, config: EncoderEvaluationConfig, encoder: VisionEncoder, output: Path, console: Console) -> None:
        self.config, self.console = config, console
        self.output = output
        self.folder = output / "features" if config.cache is None else Path(config.cache)
        self.device = choose_device(config.device)
        self.rule = probe_rule(encoder, config.image_size, config.resize)
        self.encoders: dict[str, EncoderExtractor] = {"encoder": EncoderExtractor(encoder, self.rule, self.device)}
        if "random_weights" in config.compare:
            fresh = random_weights(encoder, config.random_seed)
            self.encoders["random_weights"] = EncoderExtractor(fresh, self.rule, self.device)
        self.measurements: list[Measurement] = []
        self.differences: dict[str, dict[str, Difference]] = {}
        self.predictions: list[dict[str, Any]] = []
        self.intervals = {"samples": config.bootstrap_samples, "confidence": config.confidence, "seed": config.seed}

    def _arms(self, raw: ImageRule) -> dict[str, Extractor]:
        """Every arm's extractor; raw pixels under the rule `raw`."""
        pixels: dict[str, Extractor] = {"raw_pixels": RawPixels(raw)} if "raw_pixels" in self.config.compare else {}
        return self.encoders | pixels

    def _extract(
        self,
        arm: str,
        extractor: Extractor,
        images: Sequence[ImagePart],
        digests: Sequence[str],
        kind: Kind,
        split: str,
    ) -> Features:
        return extract(
            extractor,
            images,
            digests,
            self.folder,
            kind=kind,
            batch_size=self.config.batch_size,
            title=f"{ARM_NAMES[arm]}, {split} images",
            console=self.console,
        )

    # -- labelled images ----------------------------------------------------------------------------------------------

    def probe_labels(self, data: LabelledSet) -> dict[str, Any]:
        """Run the probes on labels; returns the facts about the data."""
        images = {"train": [item.image for item in data.train], "test": [item.image for item in data.test]}
        digests = {split: digests_of(parts) for split, parts in images.items()}
        in_train = set(digests["train"])
        shared = sum(digest in in_train for digest in digests["test"])
        if shared == len(data.test):
            raise DataError(
                f"data {data.name}: every image of the test split is in the train split too, so there is "
                "nothing new to report; set train_split and test_split to two different ones"
            )
        learn, choose = cut_development(data.train, self.config.dev_share, self.config.seed)
        right: dict[str, dict[str, np.ndarray]] = {}
        pixels: Outcome | None = None
        arms = self._arms(raw_rule(self.rule, self.config.raw_size))
        for arm, extractor in arms.items() if self.config.probes else ():
            found = self._features(arm, extractor, images, digests)
            for probe in self.config.probes:
                run = self._knn if probe == "knn" else self._linear
                outcome = run(data, found["train"], found["test"], learn, choose)
                right.setdefault(probe, {})[arm] = self._record(data, probe, arm, outcome)
                if (probe, arm) == ("linear", "raw_pixels"):
                    pixels = outcome
        if (config := self.config.fine_tuning) is not None:
            outcomes = self._fine_tuned(data, config, learn, choose, digests)
            if "raw_pixels" in arms:  # nothing in them can be trained: the linear head is what stands beside
                if pixels is None:
                    found = self._features("raw_pixels", arms["raw_pixels"], images, digests)
                    pixels = self._linear(data, found["train"], found["test"], learn, choose)
                outcomes["raw_pixels"] = (pixels[0], f"linear probe, {pixels[1]}", pixels[2])
            right["fine_tuning"] = {
                arm: self._record(data, "fine_tuning", arm, outcome) for arm, outcome in outcomes.items()
            }
        for probe, arms in right.items():
            self.differences[probe] = {
                arm: paired_difference(arms["encoder"], other, metric=ACCURACY, **self.intervals)
                for arm, other in arms.items()
                if arm != "encoder"
            }
        counts = np.bincount([item.label for item in data.train])
        return {
            "source": shown(data.name),
            "classes": list(data.classes),
            "train": len(learn),
            "development": len(choose),
            "test": len(data.test),
            "majority": float(np.mean([item.label == int(counts.argmax()) for item in data.test])),
            "test_images_in_train": shared,
        }

    def _features(
        self,
        arm: str,
        extractor: Extractor,
        images: Mapping[str, Sequence[ImagePart]],
        digests: Mapping[str, Sequence[str]],
    ) -> dict[str, Features]:
        """Pooled features of both splits."""
        return {
            split: self._extract(arm, extractor, parts, digests[split], "pooled", split)
            for split, parts in images.items()
        }

    def _fine_tuned(
        self,
        data: LabelledSet,
        config: FineTuningConfig,
        learn: Sequence[int],
        choose: Sequence[int],
        digests: Mapping[str, Sequence[str]],
    ) -> dict[str, Outcome]:
        """The encoder and its architecture with fresh weights, trained alike."""
        task = task_of(data, learn, choose, digests, self.rule)
        outcomes = {}
        for arm, extractor in self.encoders.items():
            best, scores = fine_tune(
                extractor,
                task,
                config,
                self.output / FINE_TUNING_FOLDER,
                title=f"{ARM_NAMES[arm]}, fine-tuning",
                console=self.console,
            )
            outcomes[arm] = (torch.tensor(best.predictions), best.name, scores)
        return outcomes

    def _record(self, data: LabelledSet, probe: str, arm: str, outcome: Outcome) -> np.ndarray:
        """Keep the predictions and the figure; -> right (1) or wrong (0) for each test image."""
        predicted, chosen, development = outcome
        classes = predicted.tolist()
        right = np.array([float(item.label == found) for item, found in zip(data.test, classes, strict=True)])
        self.predictions += [
            {"probe": probe, "features": arm, "id": item.id, "label": data.classes[item.label],
             "predicted": data.classes[found]}
            for item, found in zip(data.test, classes, strict=True)
        ]  # fmt: skip
        labels = np.array([item.label for item in data.test])
        parts = {
            name: float(right[labels == number].mean())
            for number, name in enumerate(data.classes)
            if (labels == number).any()
        }
        value = estimate(right, is_binary=True, metric=ACCURACY, **self.intervals)
        self.measurements.append(Measurement(probe, arm, value, chosen, development, parts))
        return right

    def _knn(self, data: LabelledSet, train: Features, test: Features, learn: list[int], choose: list[int]) -> Outcome:
        """Choose k and feature on the development part; then the whole train split votes."""
        labels = torch.tensor([item.label for item in data.train]).to(self.device)
        sources = {
            "pooled": lambda features: features["pooled"][:, 0].to(self.device),
            "mean patch": lambda features: features["mean_patch"].to(self.device),
        }
        if "mean_patch" not in train:
            del sources["mean patch"]
        ks, temperature = self.config.knn.k, self.config.knn.temperature
        scores: dict[tuple[str, int], float] = {}
        for name, take in sources.items():
            bank = take(train)
            votes = knn_predict(bank[choose], bank[learn], labels[learn], len(data.classes), ks, temperature)
            for k, predicted in votes.items():
                scores[name, k] = float((predicted == labels[choose]).double().mean())
        name, k = max(scores, key=lambda key: scores[key])
        take = sources[name]
        predicted = knn_predict(take(test), take(train), labels, len(data.classes), [k], temperature)[k]
        return (
            predicted.cpu(),
            f"{name}, k = {k}",
            {f"{one}, k = {number}": row for (one, number), row in scores.items()},
        )

    def _linear(
        self, data: LabelledSet, train: Features, test: Features, learn: list[int], choose: list[int]
    ) -> Outcome:
        labels = torch.tensor([item.label for item in data.train]).to(self.device)
        _, blocks, width = train["pooled"].shape
        heads = grid_of_heads(self.config.linear, blocks, "mean_patch" in train)
        inputs = side_by_side(train["pooled"], train.get("mean_patch")).to(self.device)
        outcome = linear_probe(
            inputs[learn],
            labels[learn],
            inputs[choose],
            labels[choose],
            side_by_side(test["pooled"], test.get("mean_patch")).to(self.device),
            heads,
            width,
            len(data.classes),
            self.config.linear,
        )
        scores = {head.name: value for head, value in outcome.development.items()}
        return outcome.predictions.cpu(), outcome.best.name, scores

    # -- masks --------------------------------------------------------------------------------------------------------

    def segment(self, data: SegmentedSet, config: SegmentationConfig) -> dict[str, Any]:
        """Run the segmentation probe; returns the facts about the data."""
        splits = {"train": data.train, "test": data.test}
        assert self.rule.size is not None, "probe_rule gives every image one size"
        masks = masks_at(data.train, self.rule.size, WORKERS)
        check_masks(data.test, WORKERS)
        digests = {split: digests_of([item.image for item in items]) for split, items in splits.items()}
        grid = grid_of_rule(self.rule)
        overlaps: dict[str, Overlaps] = {}
        for arm, extractor in self._arms(self.rule).items():
            found = {
                split: self._extract(
                    arm, extractor, [item.image for item in items], digests[split], "patches", f"segmentation {split}"
                )["patches"]
                for split, items in splits.items()
            }
            head = train_segmenter(found["train"], masks, grid, len(data.classes), config, self.device)
            overlaps[arm] = measure_overlaps(head, found["test"], data.test, grid, len(data.classes))
        for arm, rows in overlaps.items():
            value = iou_estimate(rows, **self.intervals)
            shared, whole = rows.intersection.sum(axis=0), rows.union.sum(axis=0)
            parts = {
                name: float(mean_iou(shared[number : number + 1], whole[number : number + 1]))
                for number, name in enumerate(data.classes)
                if whole[number] > 0
            }
            self.measurements.append(Measurement("segmentation", arm, value, parts=parts))
        self.differences["segmentation"] = {
            arm: iou_difference(overlaps["encoder"], rows, **self.intervals)
            for arm, rows in overlaps.items()
            if arm != "encoder"
        }
        facts = {"source": shown(data.name), "classes": list(data.classes)}
        return facts | {split: len(items) for split, items in splits.items()}
