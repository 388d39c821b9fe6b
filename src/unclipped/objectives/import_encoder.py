"""From a weights file with original names to a folder: encoder, image processor, heads, and each tensor's fate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import __version__ as transformers_version

from unclipped import __version__
from unclipped.core.errors import CheckpointError, UsageError
from unclipped.core.files import whole_folder, write_json
from unclipped.encoders.checkpoint import quiet, shortened
from unclipped.encoders.importing.config import ImportConfig
from unclipped.encoders.importing.files import OriginalWeights, read_weights
from unclipped.encoders.importing.keys import ImportedEncoder, convert
from unclipped.encoders.weights import check_values
from unclipped.images.config import ImageRule
from unclipped.objectives.dino_heads import DinoHead
from unclipped.objectives.dino_side import DinoHeads, head_from_original, save_dino_heads, sizes_of
from unclipped.objectives.trunk import write_image_processor

IMPORT_RECORD = "import.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ImportReport:
    """What was imported, and what was not."""

    source: str
    family: str
    objective: str
    shape: dict[str, Any]
    """Fields of the transformers configuration that were read off the file or given."""
    parameters: int
    statistics_from: str
    rule: dict[str, Any]
    heads: dict[str, dict[str, int]]
    left_out: dict[str, str]
    """Name in the file → why."""
    new: dict[str, str]
    """Name in the folder → what it is filled with, and why."""
    taken: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for a reader: one line a fact, tensors of one kind together."""
        shape = self.shape
        lines = [
            f"encoder     {self.family}, {self.parameters:,} parameters, objective {self.objective}",
            f"shape       width {shape['hidden_size']}, {shape['num_hidden_layers']} blocks, "
            f"{shape['num_attention_heads']} attention heads, patch {shape['patch_size']} px, "
            f"images {shape['image_size']} px",
            f"pixels      mean {self.rule['mean']}, std {self.rule['std']} ({self.statistics_from})",
        ]
        for name, sizes in self.heads.items():
            listed = ", ".join(f"{key} {value}" for key, value in sizes.items())
            lines.append(f"{name:<11} {listed}")
        lines += [f"new         {line}" for line in grouped(self.new)]
        lines += [f"left out    {line}" for line in grouped(self.left_out)]
        return [*lines, f"each tensor by name: {IMPORT_RECORD}"]


def import_encoder(config: ImportConfig, folder: Path) -> ImportReport:
    """Write `folder`: the encoder in the transformers format, `preprocessor_config.json`, `dino_heads/` where the file
    has heads, and `import.json` with every tensor's fate.

    Raises CheckpointError for a file that is no such encoder or does not fit, UsageError for what the options must say.
    """
    weights = read_weights(config.checkpoint, config.weights)
    encoder = convert(weights, config)
    left_out = encoder.left_out
    rule, statistics = _rule(config, encoder)
    if config.dino_heads is not None:
        weights = _with_heads(weights, config, left_out)
    heads = _heads(weights, encoder, left_out)
    report = ImportReport(
        source=config.checkpoint,
        family=encoder.config.model_type,
        objective=encoder.objective,
        shape=encoder.shape.config_fields(),
        parameters=sum(value.numel() for value in encoder.tensors.values()),
        statistics_from=statistics,
        rule=rule.model_dump(mode="json"),
        heads={name: sizes_of(head) for name, head in heads.named_heads().items()},
        left_out=left_out,
        new=encoder.new,
        taken=encoder.taken,
    )
    with whole_folder(folder) as temporary, quiet():
        encoder.save(temporary)
        write_image_processor(temporary, rule)
        if report.heads:
            save_dino_heads(temporary, heads)
        record = {**report.__dict__, "options": config.model_dump(mode="json")}
        versions = {"unclipped": __version__, "transformers": transformers_version}
        write_json(temporary / IMPORT_RECORD, {**record, "versions": versions})
    return report


def grouped(reasons: dict[str, str]) -> list[str]:
    """One line a reason: the first names that have it, and how many more.

    >>> grouped({"a": "why", "b": "why not", "c": "why"})
    ['a, c: why', 'b: why not']
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{shortened(listed, 3)}: {reason}" for reason, listed in names.items()]


def _rule(config: ImportConfig, encoder: ImportedEncoder) -> tuple[ImageRule, str]:
    channels: Any = encoder.shape.channels
    if channels not in (1, 3):
        raise UsageError(f"{config.checkpoint}: takes images of {channels} channels; images here have one or three")
    if config.mean is None and channels != len(IMAGENET_MEAN):
        raise UsageError(
            f"{config.checkpoint}: takes images of {channels} channels, for which there is no usual mean and standard "
            "deviation; give --mean and --std"
        )
    side, patch = encoder.shape.side, encoder.shape.patch
    size, patch_size = (side, side), (patch, patch)
    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    try:
        rule = ImageRule(rule="squash", size=size, patch_size=patch_size, channels=channels, mean=mean, std=std)
    except ValidationError as error:
        raise UsageError(f"{config.checkpoint}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return rule, "ImageNet, as published encoders of this kind" if config.mean is None else "given"


def _with_heads(weights: OriginalWeights, config: ImportConfig, left_out: dict[str, str]) -> OriginalWeights:
    """The weights with the heads of a second file, whose other tensors are added to `left_out`."""
    assert config.dino_heads is not None
    if weights.heads:
        raise UsageError(f"{config.checkpoint}: holds heads itself; leave --dino-heads out")
    beside = read_weights(config.dino_heads, config.weights)
    if not beside.heads:
        raise CheckpointError(f"{config.dino_heads}: holds no DINO heads (dino_head.…, ibot_head.…); leave it out")
    others = dict.fromkeys(beside.encoder, "only the heads of this file are taken") | beside.left_out
    left_out |= {f"{beside.path.name}: {name}": reason for name, reason in others.items()}
    return OriginalWeights(beside.path, weights.encoder, beside.heads)


def _heads(weights: OriginalWeights, encoder: ImportedEncoder, left_out: dict[str, str]) -> DinoHeads:
    """The heads of the file; those that have no place here are added to `left_out`."""
    made: dict[str, DinoHead] = {}
    for name, tensors in weights.heads.items():
        head = head_from_original(f"{weights.path}, {name}", tensors, encoder.shape.width)
        if isinstance(head, str):
            left_out |= {f"{name}.{tensor}": head for tensor in tensors}
        else:
            check_values(f"{weights.path}, {name}", tensors)
            made[name] = head
    token = weights.encoder.get("mask_token")
    fits = token is not None and token.numel() == encoder.shape.width
    return DinoHeads(made.get("dino_head"), made.get("ibot_head"), token if fits else None)
