"""Train a vision-language model in stages."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unclipped.core.errors import UsageError
from unclipped.data.config import DataConfig
from unclipped.data.inputs import check_inputs
from unclipped.data.mixture import Mixture
from unclipped.encoding.examples import position_limit
from unclipped.models.checkpoint import save_model
from unclipped.models.freezing import set_trainable
from unclipped.models.modeling import UnclippedForConditionalGeneration
from unclipped.models.processing import UnclippedProcessor
from unclipped.objectives.answer import AnswerObjective
from unclipped.objectives.ctc import CTCHead
from unclipped.training import measure
from unclipped.training.batches import StageBatches
from unclipped.training.config import StageConfig, TrainingConfig
from unclipped.training.device import world
from unclipped.training.examples import MixtureExamples
from unclipped.training.record import TrainingResult
from unclipped.training.stages import Job, run_stages
from unclipped.training.text import TextBlocks


def train_stages(
    model: UnclippedForConditionalGeneration,
    processor: UnclippedProcessor,
    stages: Sequence[StageConfig],
    training: TrainingConfig,
    data: DataConfig | None,
    output: str | Path,
    *,
    resume: bool = False,
    held_out: TextBlocks | Sequence[Sequence[int]] | None = None,
) -> TrainingResult:
    """Train `model` in place through `stages` and write the run folder `output` (see `run_stages`).

    `data`: used by stages that name none. `held_out`: token blocks of text (see `held_out_blocks`) on which the
    perplexity of the model is measured before and after each stage. Raises UsageError when a stage has no data, and
    when `resume` meets data files that have changed since the run began.
    """
    if world()[0] == 0:
        check_inputs(Path(output), [data, *stages], resume=resume)
    job = _VisionLanguageJob(model, processor, training, data, held_out)
    return run_stages(job.job(), stages, training, output, resume=resume)


def data_seed(stage: StageConfig, training: TrainingConfig) -> int:
    """Seed of a stage's mixture: another one for each stage, since an endless source begins anew with a seed."""
    return training.seed + zlib.crc32(stage.name.encode())


class _VisionLanguageJob:
    def __init__(
        self,
        model: UnclippedForConditionalGeneration,
        processor: UnclippedProcessor,
        training: TrainingConfig,
        data: DataConfig | None,
        held_out: TextBlocks | Sequence[Sequence[int]] | None,
    ) -> None:
        self.model, self.processor, self.training, self.data = model, processor, training, data
        self.held_out = held_out if held_out is None or isinstance(held_out, TextBlocks) else TextBlocks(list(held_out))
        limit = position_limit(model)
        longest = max(map(len, self.held_out.blocks), default=0) if self.held_out is not None else 0
        if limit is not None and longest > limit:
            raise UsageError(
                f"held_out_length: blocks of {longest} tokens do not fit in the model's {limit} positions; lower it"
            )

    def job(self) -> Job:
        return Job(
            model=self.model,
            make_objective=self.make_objective,
            make_examples=self.make_examples,
            save=self.save,
            measure_text=self.measure_text if self.held_out is not None else None,
            prepare=self.prepare,
            skip=self.skip,
        )

    def save(self, folder: Path) -> None:
        save_model(self.model, self.processor, folder, overwrite=True)

    def data_of(self, stage: StageConfig) -> DataConfig:
        data = stage.data or self.data
        if data is None:
            raise UsageError(f"stage '{stage.name}' has no data: give data to the stage or to the whole recipe")
        return data

    def skip(self, stage: StageConfig) -> str | None:
        if self.data_of(stage).blind == "removed" and "text" not in stage.train:
            return f"the data is blind and only {', '.join(stage.train)} would be trained"
        return None

    def make_objective(self, stage: StageConfig, carried: dict[str, Any]) -> AnswerObjective:
        set_trainable(self.model, stage.train)
        if "ctc" in stage.auxiliary and "ctc_head" not in carried:
            tokenizer = self.processor.tokenizer
            special = set(tokenizer.all_special_ids) | {
                index for index, token in tokenizer.added_tokens_decoder.items() if token.special
            }
            head = CTCHead(
                self.model.model.vision_tower.spec.hidden_size,
                self.model.get_output_embeddings().weight.shape[0],  # type: ignore[arg-type]
                special=frozenset(special),
                image_token_id=self.model.config.image_token_id,
            )
            if "ctc_head" in carried.get("states", {}):
                head.load_state_dict(carried["states"]["ctc_head"])
            carried["ctc_head"] = head
        return AnswerObjective(self.model, auxiliary=stage.auxiliary, ctc_head=carried.get("ctc_head"))

    def make_examples(self, stage: StageConfig) -> MixtureExamples:
        mixture = Mixture(self.data_of(stage), data_seed(stage, self.training))
        return MixtureExamples(
            mixture, self.processor, max_length=stage.max_length, positions=position_limit(self.model)
        )

    def measure_text(self) -> dict[str, float]:
        assert self.held_out is not None
        return measure.text_perplexity(self.model, self.held_out.blocks, bytes_per_block=self.held_out.bytes_per_block)

    @torch.no_grad()
    def prepare(self, stage: StageConfig, batches: StageBatches, device: torch.device) -> None:
        """Measure what a standardising connector subtracts and divides by, once, on the first batches of the stage."""
        connector = self.model.model.connector
        if not connector.config.standardise or "connector" not in stage.train:
            return
        if self.data_of(stage).blind == "removed":  # no image ever reaches this connector
            return
        if bool((connector.mean != 0).any()) or bool((connector.std != 1).any()):
            return  # measured in an earlier stage: the projection was trained on those values
        number = 0
        total, squares = torch.zeros(()), torch.zeros(())
        for step in range(min(stage.standardise_batches, stage.steps)):
            batch = batches.examples.batch(batches.global_indices(step))
            if "pixel_values" not in batch:
                continue
            grid = batch["image_grid_thw"]
            tower = self.model.model.vision_tower
            features = tower(batch["pixel_values"].to(device), grid.to(device)).cpu()  # (sum of patches, hidden)
            merged = connector.merge(features, [tuple(row) for row in grid.tolist()]).double()  # (tokens, inputs)
            number += len(merged)
            total, squares = total.to(merged) + merged.sum(0), squares.to(merged) + (merged**2).sum(0)
        if number == 0:
            raise UsageError(f"stage '{stage.name}': the connector standardises, but the first batches have no image")
        mean = total / number
        std = (squares / number - mean**2).clamp(min=0).sqrt()
        std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a constant feature is centred and left alone
        connector.set_standardisation(mean.float(), std.float())
