"""Configuration of an experiment: one model, its data and stages, and the baselines trained alike. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from unclipped.core.config import Count, FrozenConfig, Name, Processes, Tokens, Whole
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.evaluation.config import EvaluationConfig
from unclipped.models.config import ModelConfig
from unclipped.training.config import StageConfig, TrainingConfig

Baseline = Literal["blind", "random_encoder"]


class ExperimentConfig(FrozenConfig):
    """A training run with its evaluation and its baselines."""

    description: str = ""
    """What the run is for, in one sentence; stands at the head of the report."""
    difficulty: str = ""
    """How hard the data is and what the test split withholds; stands in the report."""
    model: ModelConfig
    """Encoder, connector and language model."""
    data: DataConfig
    """Training data of the stages that name none."""
    stages: Annotated[tuple[StageConfig, ...], Field(max_length=100)]
    """Stages in order; each trains the parts that it names."""
    pixel_statistics: Literal["model", "data"] = "model"
    """Mean and deviation that pixels are normalised with: the model's, or those of 512 images of the first stage."""
    training: TrainingConfig = TrainingConfig()
    """The machine, the optimiser and the seed."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Tasks on which the model and its baselines are scored."""
    held_out_text: Annotated[tuple[SourceConfig, ...], Field(max_length=1000)] = ()
    """Text on which the language model's perplexity is measured before and after each stage."""
    held_out_blocks: Count = 64
    """Blocks of that text."""
    held_out_length: Annotated[Tokens, Field(ge=2)] = 128
    """Tokens in such a block."""
    baselines: Annotated[tuple[Baseline, ...], Field(max_length=2)] = ()
    """Arms trained alike: `blind` (no image in training and test), `random_encoder` (fresh encoder weights)."""
    arms_at_once: Processes = 1
    """Arms trained side by side, each in a process with its share of the cores; small models gain from it."""
    blind_image: Literal["removed", "blank"] = "removed"
    """What the blind arm gets: no image, or an image of the mean colour (for runs that train the connector alone)."""
    chat_examples: Annotated[Whole, Field(ge=0, le=1000)] = 3
    """Test images saved beside the report, to try the chat command on."""
    chat_category: Name | None = None
    """Category that those images are taken from; null: any."""

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        if not self.stages:
            raise ValueError("stages: give at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: names must differ, found {', '.join(names)}")
        if "blind" in self.baselines and self.blind_image == "removed":
            idle = [stage.name for stage in self.stages if "text" not in stage.train]
            if len(idle) == len(self.stages):
                raise ValueError(
                    "baselines: no stage trains the text part, so a blind arm without images has nothing to train; "
                    "set blind_image: blank"
                )
        return self


@dataclass(frozen=True)
class Arm:
    """One trained and evaluated variant: the model itself, or a baseline."""

    name: str
    config: ExperimentConfig
    folder: Path
