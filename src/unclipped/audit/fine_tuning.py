"""Fine-tuning: the whole encoder and a linear head trained on labels, lower blocks more slowly than upper ones.

Layer-wise decay as in BEiT (arXiv 2106.08254) and the masked autoencoder (arXiv 2111.06377, appendix A): the learning
rate of a block is that of the head times decay^(distance from the head). The head reads what the other probes call the
pooled feature and starts at zero. Every learning rate is trained from the same weights with the same images; what is
finished lies on disk and is not trained again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from unclipped.audit.config import FineTuningConfig, TrainingViews
from unclipped.audit.data import LabelledImage, LabelledSet
from unclipped.audit.features import WORKERS, EncoderExtractor, grid_of_rule, pooled
from unclipped.audit.linear import batches
from unclipped.core.documents import read_json
from unclipped.core.errors import UnclippedError, UsageError
from unclipped.core.files import write_json
from unclipped.core.progress import Counter, counting
from unclipped.data.sample import ImagePart
from unclipped.data.views import view
from unclipped.encoders.base import VisionEncoder
from unclipped.images.config import ImageRule
from unclipped.images.prepare import packed, prepare, resized
from unclipped.training.config import StageConfig
from unclipped.training.device import repeated_blocks
from unclipped.training.optim import build_scheduler

_CACHE_BYTES = 1 << 29  # of prepared pixels


@torch.no_grad()
def layers_of(encoder: VisionEncoder, grid: tuple[int, int]) -> dict[str, int]:
    """The layer of each trainable parameter of `encoder.model`, found by running it once.

    0: what comes before the first block (patch embedding, positions, prefix tokens); i: block i of L; L + 1: what comes
    after the last. Raises UsageError for an encoder that returns chosen layers (nothing would train those above), and
    for one whose blocks cannot be told.
    """
    model, depth = encoder.model, encoder.depth(encoder.model.config)
    if encoder.feature_layers is not None:
        raise UsageError(
            f"fine_tuning: the encoder returns its layers {list(encoder.feature_layers)}, so that parameters above "
            "them would get no gradient; load it without feature_layers"
        )
    blocks = repeated_blocks(model)
    if len(blocks) != depth:
        raise UsageError(
            f"fine_tuning: family {encoder.family} declares {depth} blocks, but {len(blocks)} repeated modules were "
            "found; layer decay needs to know the blocks"
        )
    inside = {id(p): number for number, block in enumerate(blocks, start=1) for p in block.parameters()}
    begun: dict[str, int] = {}
    passed = 0

    def note(name: str, is_block: bool) -> None:
        nonlocal passed
        passed += is_block
        begun.setdefault(name, depth + 1 if passed == depth else passed)

    identities = {id(block) for block in blocks}
    hooks = [
        module.register_forward_pre_hook(lambda module, _inputs, name=name: note(name, id(module) in identities))
        for name, module in model.named_modules()
    ]
    was_training = encoder.training
    try:
        spec, like = encoder.spec, next(model.parameters())
        encoder.eval().run(like.new_zeros(1, grid[0] * grid[1], spec.patch_values), [grid], False)
    finally:
        encoder.train(was_training)
        for hook in hooks:
            hook.remove()

    def layer(name: str) -> int:
        # Tables are read without a call of their module: then it is the module around that has begun.
        while name and name not in begun:
            name = name.rpartition(".")[0]
        return begun.get(name, 0)

    return {
        name: inside[id(parameter)] if id(parameter) in inside else layer(name.rpartition(".")[0])
        for name, parameter in model.named_parameters()
    }


def parameter_groups(
    encoder: VisionEncoder, head: nn.Linear, layers: dict[str, int], rate: float, config: FineTuningConfig
) -> list[dict[str, Any]]:
    """AdamW groups by layer, and decayed or not: `lr` is `rate` · layer_decay^(top - layer); the head is at the top."""
    top = encoder.depth(encoder.model.config) + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in encoder.model.named_parameters():
        groups.setdefault((layers[name], parameter.ndim >= 2), []).append(parameter)
    for parameter in head.parameters():
        groups.setdefault((top, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate * config.layer_decay ** (top - layer),
            "weight_decay": config.weight_decay if is_matrix else 0.0,
        }
        for (layer, is_matrix), parameters in groups.items()
    ]


class Pictures:
    """Labelled images as batches under one rule: whole, or as random views that follow from seed and draw alone."""

    def __init__(self, images: Sequence[ImagePart], labels: Sequence[int], rule: ImageRule) -> None:
        self.images, self.labels, self.rule = images, torch.tensor(labels), rule
        self._whole: dict[int, Image.Image] = {}
        self._held = 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], pool: ThreadPoolExecutor) -> Tensor:
        """Patches (B, n, C·ph·pw) of whole images."""
        return torch.stack([packed(image, self.rule).patches for image in pool.map(self._resized, indices)])

    def views(self, indices: Sequence[int], first: int, views: TrainingViews, seed: int, pool: Any) -> Tensor:
        """Patches (B, n, C·ph·pw) of random views; `first` is the number of the first draw."""
        rows, columns = self.rule.size or (0, 0)
        if rows != columns:
            raise UsageError(f"fine_tuning.augment: views are square, but images are {rows}x{columns} px; leave it out")
        config = views.of_size(rows)

        def one(draw: int, index: int) -> Tensor:
            def changed(image: Image.Image) -> Image.Image:
                return Image.fromarray(view(image, config, np.random.default_rng([seed, draw, 21])))  # (side, side, 3)

            return prepare(self.images[index], self.rule, changed).patches

        return torch.stack(list(pool.map(one, range(first, first + len(indices)), indices)))

    def _resized(self, index: int) -> Image.Image:
        """The image at the rule's size, kept while there is room."""
        if index in self._whole:
            return self._whole[index]
        image = resized(self.images[index], self.rule)
        size = image.width * image.height * len(image.getbands())
        if self._held + size <= _CACHE_BYTES:
            self._held += size
            self._whole[index] = image
        return image


@dataclass(frozen=True)
class Tuned:
    """What training with one learning rate came to."""

    learning_rate: float
    development: float | None
    """Accuracy on the development part; None when the loss stopped being a number."""
    predictions: list[int]
    """Classes of the test images."""

    @property
    def name(self) -> str:
        """Text form for tables."""
        return f"learning rate {self.learning_rate:g}"


@dataclass(frozen=True)
class Task:
    """The images of one fine-tuning: to learn from, to choose on, to report."""

    learn: Pictures
    choose: Pictures
    test: Pictures
    num_classes: int
    key: str
    """Differs whenever images, labels or their parts do."""


def task_of(
    data: LabelledSet,
    learn: Sequence[int],
    choose: Sequence[int],
    digests: Mapping[str, Sequence[str]],
    rule: ImageRule,
) -> Task:
    """The task of labelled images: positions of the train split to learn from and to choose on, the test split."""

    def pictures(items: Sequence[LabelledImage]) -> Pictures:
        return Pictures([item.image for item in items], [item.label for item in items], rule)

    facts = [[*found, [item.label for item in items]] for found, items in
             ((digests["train"], data.train), (digests["test"], data.test))]  # fmt: skip
    key = hashlib.blake2b(json.dumps([*facts, list(learn), list(choose)]).encode(), digest_size=16).hexdigest()
    return Task(
        learn=pictures([data.train[position] for position in learn]),
        choose=pictures([data.train[position] for position in choose]),
        test=pictures(data.test),
        num_classes=len(data.classes),
        key=key,
    )


def tune(
    encoder: VisionEncoder,
    task: Task,
    rate: float,
    config: FineTuningConfig,
    device: torch.device,
    pool: ThreadPoolExecutor,
    counter: Counter | None = None,
) -> Tuned:
    """Train a copy of `encoder` and a head with one learning rate; the encoder itself is left as it is."""
    grid, spec = grid_of_rule(task.learn.rule), encoder.spec
    encoder = copy.deepcopy(encoder).to(device)
    layers = layers_of(encoder, grid)
    head = nn.Linear(spec.hidden_size, task.num_classes).to(device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimiser = torch.optim.AdamW(parameter_groups(encoder, head, layers, rate, config), betas=(0.9, 0.999))
    batch_size = min(config.batch_size, len(task.learn))
    warmup = min(round(config.warmup_share * config.steps), config.steps - 1)
    course = StageConfig(train={"vision": rate}, steps=config.steps, batch_size=batch_size, warmup_steps=warmup)
    scheduler = build_scheduler(optimiser, course)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def scores(patches: Tensor) -> Tensor:
        patches = patches.to(device, encoder.model.dtype)
        states = encoder.run(patches, [grid] * len(patches), False).last_hidden_state  # (B, prefix + n, D)
        return head(pooled(states, spec.num_prefix_tokens).float())  # (B, C)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        encoder.train()
        for step, index in enumerate(batches(len(task.learn), batch_size, config.steps, config.seed)):
            chosen = index.tolist()
            if config.augment is None:
                patches = task.learn.batch(chosen, pool)
            else:
                patches = task.learn.views(chosen, step * batch_size, config.augment, config.seed, pool)
            loss = functional.cross_entropy(scores(patches), task.learn.labels[index].to(device))
            if not bool(torch.isfinite(loss)):
                return Tuned(rate, None, [])
            optimiser.zero_grad()
            loss.backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimiser.step()
            scheduler.step()
            if counter is not None:
                counter.advance(1)
    encoder.eval()

    @torch.no_grad()
    def classes(pictures: Pictures) -> Tensor:
        parts = torch.arange(len(pictures)).split(config.batch_size)
        return torch.cat([scores(pictures.batch(part.tolist(), pool)).argmax(dim=-1).cpu() for part in parts])

    right = (classes(task.choose) == task.choose.labels).double().mean()
    return Tuned(rate, float(right), classes(task.test).tolist())


def fine_tune(
    extractor: EncoderExtractor,
    task: Task,
    config: FineTuningConfig,
    folder: Path,
    *,
    title: str = "fine-tuning",
    console: Console | None = None,
) -> tuple[Tuned, dict[str, float]]:
    """Train with each learning rate; → the one best on the development part (the smallest of equals), and all figures.

    What is finished is written into `folder` at once and read from there by the next call. Raises UsageError when the
    loss stopped being a number with every learning rate.
    """
    console = console or Console(stderr=True, quiet=True)
    found = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for rate in sorted(config.learning_rates):
            path = folder / f"{_key(extractor, task, rate, config)}.json"
            if not path.is_file():
                with counting(f"{title}, learning rate {rate:g}", config.steps, 0, console) as counter:
                    tuned = tune(extractor.encoder, task, rate, config, extractor.device, pool, counter)
                write_json(path, {"development": tuned.development, "predictions": tuned.predictions})
            found.append(_read(path, rate, len(task.test), task.num_classes))
    kept = [tuned for tuned in found if tuned.development is not None]
    if not kept:
        raise UsageError(
            f"fine_tuning.learning_rates: the loss stopped being a number with each of {list(config.learning_rates)}; "
            "lower them"
        )
    best = max(kept, key=lambda tuned: tuned.development or 0.0)
    return best, {tuned.name: tuned.development or 0.0 for tuned in found}


def _key(extractor: EncoderExtractor, task: Task, rate: float, config: FineTuningConfig) -> str:
    settings = config.model_dump_json(exclude={"learning_rates"})
    text = "\n".join([extractor.fingerprint, extractor.rule.model_dump_json(), settings, repr(rate), task.key])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: Path, rate: float, count: int, classes: int) -> Tuned:
    row = read_json(path, error=UnclippedError, remedy="delete the file, and it is trained again")
    development, predictions = row.get("development"), row.get("predictions")
    is_share = type(development) in (int, float) and 0 <= development <= 1
    are_classes = isinstance(predictions, list) and all(type(one) is int and 0 <= one < classes for one in predictions)
    if not are_classes or not (is_share or development is None):
        raise UnclippedError(f"{path}: not a finished fine-tuning; delete the file, and it is trained again")
    tuned = Tuned(rate, development, predictions)
    if tuned.development is not None and len(tuned.predictions) != count:
        raise UnclippedError(
            f"{path}: expected {count} predictions of a finished fine-tuning, found {len(tuned.predictions)}; delete "
            "the file"
        )
    return tuned
