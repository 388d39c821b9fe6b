"""Configuration of training: optimisers, stages, the machine, pretraining. Imports no torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unclipped.attention.config import SparseTrainingConfig
from unclipped.core.config import (
    BatchSize,
    Count,
    CountOrZero,
    Decay,
    FrozenConfig,
    LossWeight,
    Number,
    Options,
    PathText,
    Pixels,
    Rate,
    Seed,
    Share,
    Threads,
    Tokens,
    Whole,
)
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.objectives.captioning_config import CaptioningConfig
from unclipped.objectives.dinov2_config import DinoV2Config
from unclipped.objectives.distill_config import DistillConfig
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig
from unclipped.objectives.pairs_config import PairsConfig

Part = Literal["vision", "connector", "text"]
Auxiliary = Literal["ctc"]
Schedule = Literal["cosine", "linear", "constant"]
WeightDecay = Annotated[Number, Field(ge=0, le=1000)]
ClipNorm = Annotated[Number, Field(gt=0, le=1_000_000)]


class OptimizerConfig(FrozenConfig):
    """How gradients become updates; learning rates of AdamW stand in the stage, one for each part."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon (as in torch.optim) on the hidden matrices of the blocks, AdamW on everything else."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW: decay of the running mean of the gradient and of its square."""
    epsilon: Annotated[Number, Field(gt=0, le=1)] = 1e-8
    """AdamW: added to the root of the running square."""
    weight_decay: WeightDecay | dict[Part, WeightDecay] = 0.0
    """AdamW: decoupled weight decay of matrices, one number or one for each part (norms, biases, LayerScale, gains and
    other vectors: none)."""
    final_weight_decay: WeightDecay | None = None
    """AdamW: weight decay at the end of the schedules, reached from `weight_decay` on half a cosine; null: constant."""
    patch_embedding_factor: Rate = 1.0
    """Factor on the learning rate of a vision encoder's patch embedding."""
    layer_decay: Annotated[Share, Field(gt=0)] = 1.0
    """Factor on the learning rate of a vision encoder's layers for each block that lies above; 1: all learn alike. Of n
    blocks, number i (from 0) has the power n − i, embeddings n + 1, the final norm and heads 0."""
    muon_learning_rate: Rate = 1e-2
    """Muon: learning rate of hidden matrices."""
    muon_scale: dict[Part, Rate] = Field(default_factory=dict)
    """Muon: factor on `muon_learning_rate` for single parts, 1 where absent."""
    muon_momentum: Decay = 0.95
    """Muon: decay of the momentum."""
    muon_weight_decay: WeightDecay = 0.01
    """Muon: decoupled weight decay."""
    muon_parts: Annotated[tuple[Part, ...], Field(max_length=3)] = ("vision", "connector", "text")
    """Muon: the parts whose hidden matrices it updates; those of other parts stay with AdamW."""

    @model_validator(mode="after")
    def _one_decay(self) -> OptimizerConfig:
        if self.final_weight_decay is not None and isinstance(self.weight_decay, dict):
            raise ValueError(
                "final_weight_decay: expected one number under weight_decay beside it, found one for each part; give "
                "one number, or leave final_weight_decay out"
            )
        return self


class StageConfig(FrozenConfig):
    """One stage of training: what is trained, how fast, for how long, on what."""

    name: str = Field(default="train", min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the stage, used for files and metrics."""
    train: dict[Part, Rate]
    """Learning rate of AdamW for each trained part; parts that are absent are frozen."""
    steps: Count
    """Number of optimiser steps."""
    batch_size: BatchSize = 32
    """Samples in one optimiser step, over all processes and accumulated micro-batches."""
    gradient_accumulation: BatchSize = 1
    """Micro-batches into which each process cuts its share of a batch (less memory, the same update)."""
    warmup_steps: CountOrZero = 0
    """Steps over which learning rates rise linearly from zero."""
    schedule: Schedule = "cosine"
    """Course of the learning rates after the warm-up."""
    final_ratio: Share = 0.0
    """Share of the learning rate that is left at the end of the schedules (cosine and linear)."""
    schedule_steps: Count | None = None
    """Step of this stage at which the schedules end: learning rate, weight decay, dinov2's teacher momentum. Below
    `steps`: the last values stay to the end; above: the run ends on the way; null: `steps`."""
    data: DataConfig | None = None
    """Data of this stage; null: the recipe's `data`."""
    max_length: Tokens | None = None
    """Longest sequence in tokens; null: no limit."""
    optimizer: OptimizerConfig | None = None
    """Optimiser of this stage; null: the one under `training`."""
    sparse: SparseTrainingConfig | None = None
    """Train under this pattern of sparse prefill; null: dense. Rows that share an image (`share_image`) stay dense."""
    auxiliary: dict[Auxiliary, Annotated[LossWeight, Field(gt=0)]] = Field(default_factory=dict)
    """Weights of auxiliary loss parts. `ctc`: the encoder's tokens in reading order must spell the answer."""
    clip_norm: ClipNorm | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    clip_per_module: bool = False
    """`clip_norm` holds for the gradient of each sub-module by itself: of dinov2 the encoder and each head, elsewhere
    each part."""
    standardise_batches: Annotated[Whole, Field(ge=1, le=1_000_000)] = 8
    """Batches on which a connector with `standardise` measures mean and standard deviation of the features."""

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        if not self.train:
            raise ValueError(
                f"stage '{self.name}' trains nothing: give a learning rate under train, e.g. connector: 1e-3"
            )
        if "ctc" in self.auxiliary and "vision" not in self.train:
            raise ValueError(f"stage '{self.name}': auxiliary ctc needs vision under train; it teaches the encoder")
        if self.warmup_steps >= self.steps and self.steps > 1:
            raise ValueError(
                f"stage '{self.name}': warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})"
            )
        if self.schedule_steps is not None and self.warmup_steps >= self.schedule_steps:
            raise ValueError(
                f"stage '{self.name}': warmup_steps ({self.warmup_steps}) must be below schedule_steps "
                f"({self.schedule_steps})"
            )
        if self.clip_per_module and self.clip_norm is None:
            raise ValueError(f"stage '{self.name}': clip_per_module needs a clip_norm, found null; give one")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"stage '{self.name}': batch_size ({self.batch_size}) is no multiple of "
                f"gradient_accumulation ({self.gradient_accumulation})"
            )
        return self

    @property
    def schedule_length(self) -> int:
        """Step at which the schedules end."""
        return self.schedule_steps or self.steps


class PhaseStage(StageConfig):
    """A stage of pretraining at a side of the images of its own; made from `PretrainConfig.phases`."""

    image_size: Pixels
    """Side of the images in pixels."""
    local_size: Pixels | None = None
    """dinov2: side of the local crops in pixels; null: in proportion to `image_size`."""


class TrainingConfig(FrozenConfig):
    """The machine and the run: what holds for all stages."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto`: CUDA, else MPS, else CPU. Choose among several CUDA devices with CUDA_VISIBLE_DEVICES."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on CUDA devices that support it, fp32 elsewhere. Weights stay fp32."""
    compile: bool | Literal["auto"] = False
    """torch.compile of the model; `auto`: on CUDA only."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes (torchrun): replicate the model, or shard parameters, gradients and optimiser."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser of stages that name none."""
    seed: Seed = 0
    """Seed of data order, augmentation and initialisation of new tensors."""
    threads: Threads | None = None
    """CPU threads of torch; null: torch's own choice."""
    workers: Annotated[Whole, Field(ge=0, le=1024)] = 0
    """Processes that prepare samples; 0: the training process itself."""
    save_every_steps: Count | None = None
    """Steps between checkpoints; null: only when interrupted and between stages."""
    log_every_steps: Count = 10
    """Steps between lines of metrics."""
    length_grouping: Annotated[Whole, Field(ge=0, le=1_000_000)] = 0
    """Batches in a window that is sorted by length so that batches hold alike lengths; 0: no grouping."""


class TokenizerConfig(FrozenConfig):
    """The tokenizer of a language model trained from text."""

    kind: Literal["bpe", "characters"] = "bpe"
    """`bpe`: byte-level pairs, any text. `characters`: one token a character, unknown bytes by byte tokens."""
    vocabulary_size: Annotated[Whole, Field(ge=1, le=1_000_000)] = 1024
    """bpe: number of tokens, special tokens included."""
    split_digits: bool = True
    """bpe: each digit is a token, so that numbers are spelt."""
    characters: str | None = None
    """characters: the alphabet beside printable ASCII; null: every character found in the training text."""
    documents: Count = 5_000
    """Documents of the mixture from which the tokenizer is trained."""
    source: PathText | None = None
    """Folder or hub id of a tokenizer to take as it is, instead of training one."""


class PhaseConfig(FrozenConfig):
    """A further stage of pretraining an encoder, at a larger side of its images. Weights, heads and teacher go on;
    positions are interpolated once; the optimiser starts anew."""

    image_size: Pixels
    """Side of the (global) images in pixels, larger than that of the stage before."""
    steps: Count
    """Number of optimiser steps."""
    batch_size: BatchSize | None = None
    """Images in one optimiser step, over all processes; null: that of the main stage."""
    gradient_accumulation: BatchSize | None = None
    """Micro-batches into which each process cuts its share of a batch; null: as in the main stage."""
    learning_rate: Rate | None = None
    """Learning rate of AdamW, for `base_batch_size` where there is one; null: that of the main stage. With `muon`, the
    rate of hidden matrices is changed by the same factor. Web-SSL takes a twenty-fifth of the main stage's."""
    warmup_steps: CountOrZero | None = None
    """Steps over which learning rates rise linearly from zero; null: the main stage's in proportion to `steps`."""
    schedule: Schedule | None = None
    """Course of the learning rate after the warm-up; null: that of the main stage."""
    local_size: Pixels | None = None
    """dinov2: side of the local crops in pixels; null: in proportion to `image_size`, to the nearest multiple of the
    patch."""


class PretrainConfig(FrozenConfig):
    """Pretraining of one part alone: a decoder language model from text, or a vision encoder from images."""

    objective: Literal[
        "language_model", "masked_autoencoder", "dinov2", "distill", "captioning", "contrastive", "sigmoid", "coca"
    ]
    """What is learned."""
    shape: Options = Field(default_factory=dict)
    """Fields of the transformers configuration; `model_type` is `qwen3` (language_model), `vit_mae`
    (masked_autoencoder only), or `vit`, `dinov2`, `dinov2_with_registers`, `unclipped_llm_encoder`
    (all but language_model). Those also take named shapes, `{name: small}`: tiny, small, webdino-0.3b … -7b,
    webmae-0.3b … -3b. Beside `init: llm:…` it holds patch_size, num_channels, rope_form, rope_theta, stem,
    stem_channels; beside another `init` at most drop_path_rate, hidden_dropout_prob, attention_probs_dropout_prob."""
    init: PathText | None = None
    """Encoders: folder (`$NAME` is an environment variable) or hub id of a saved encoder (vit, dinov2,
    dinov2_with_registers, vit_mae, unclipped_llm_encoder) whose weights training starts from, or `llm:` and a language
    model to turn into an encoder; null: fresh weights of `shape`. Images keep the mean and deviation that it states."""
    baseline: bool = False
    """init: allow an encoder that was trained by comparing images with text; what is trained from it stays a baseline.
    The objectives that are baselines themselves need no such word."""
    init_heads: Literal["fresh", "continue"] = "fresh"
    """init: what the objective adds to the encoder. `continue`: from what the same objective saved in the folder, the
    tokenizer and text side (contrastive, sigmoid, coca) or caption decoder (captioning), the heads and mask token
    (dinov2), the decoder of a ViTMAEForPreTraining (masked_autoencoder). `fresh`: new ones."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """language_model, captioning, contrastive, sigmoid, coca: the tokenizer, trained on the text or the captions."""
    data: DataConfig
    """Text files and samples (language_model), samples with images (masked_autoencoder, dinov2, distill), samples of
    one image and one answer, the caption (captioning, contrastive, sigmoid, coca)."""
    held_out: Annotated[tuple[SourceConfig, ...], Field(max_length=1000)] = ()
    """language_model: sources of the text on which perplexity is reported; empty: blocks held back from `data`."""
    held_out_blocks: Count = 64
    """Blocks (language_model) or images (masked_autoencoder) on which the held-out loss is measured."""
    rows: Literal["blocks", "samples"] = "blocks"
    """language_model: `blocks`: all text in one stream cut into blocks, every token predicted. `samples`: one document
    or sample a row, padded; of a sample only the answers are predicted, of a document every token."""
    block_length: Tokens = 256
    """language_model: tokens in a block, and the longest row of `samples`."""
    prepared_tokens: Annotated[Whole, Field(ge=1, le=10**12)] = 4_000_000
    """language_model: most tokens that `blocks` prepares before training; they repeat in a fresh order after that."""
    steps: Count
    """Number of optimiser steps."""
    batch_size: BatchSize = 32
    """Blocks or images in one optimiser step, over all processes."""
    gradient_accumulation: BatchSize = 1
    """Micro-batches into which each process cuts its share of a batch."""
    learning_rate: Rate = 1e-3
    """Learning rate of AdamW (with `muon`: of what is no hidden matrix)."""
    base_batch_size: BatchSize | None = None
    """Batch size that `learning_rate` is meant for: the rate is `learning_rate` · √(`batch_size` / `base_batch_size`),
    in DINOv2 2e-4 for 1024; null: `learning_rate` as it is."""
    warmup_steps: CountOrZero = 0
    """Steps over which learning rates rise linearly from zero."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up."""
    final_ratio: Share = 0.0
    """Share of the learning rate that is left at the end of the schedule."""
    final_learning_rate: Annotated[Number, Field(ge=0, le=1000)] | None = None
    """Learning rate at the end of the schedule, in place of `final_ratio`; null: `final_ratio` says it."""
    schedule_steps: Count | None = None
    """Step at which the schedules end: learning rate, weight decay, dinov2's teacher momentum. Below `steps`: the last
    values stay to the end; above: the run ends on the way; null: `steps`."""
    clip_norm: ClipNorm | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    clip_per_module: bool = False
    """`clip_norm` holds for the gradient of each sub-module by itself: of dinov2 the encoder and each head."""
    image_size: Pixels | None = None
    """Encoders: (global) images are stretched to this square side in pixels, for which the position table is made, or
    to which that of `init` is interpolated; null: that of `shape` or `init`, else 96."""
    phases: Annotated[tuple[PhaseConfig, ...], Field(max_length=100)] = ()
    """Encoders: stages after the main one, each at a larger side of the images."""
    smallest_window: Pixels | None = None
    """masked_autoencoder, distill: smallest side in pixels of the random window cut from the batch; null: none."""
    flip: bool = True
    """masked_autoencoder, distill: mirror half of the images."""
    masked_autoencoder: MaskedAutoencoderConfig = MaskedAutoencoderConfig()
    """masked_autoencoder: mask and decoder, except for the shape `vit_mae`, which names them itself."""
    dinov2: DinoV2Config = DinoV2Config()
    """dinov2: crops, heads, centring and weights of the loss."""
    distill: DistillConfig | None = None
    """distill: the frozen teacher, and the weights of the loss."""
    pairs: PairsConfig = PairsConfig()
    """contrastive, sigmoid, coca (baselines): the text side, and the weights of coca's loss. captioning: its
    `context_length` and `long_captions`."""
    captioning: CaptioningConfig = CaptioningConfig()
    """captioning: the decoder, and how often captions are predicted all at once."""
    training: TrainingConfig = TrainingConfig(optimizer=OptimizerConfig(name="muon"))
    """The machine, the optimiser and the seed."""

    @model_validator(mode="after")
    def _are_stages(self) -> PretrainConfig:
        if self.objective == "language_model" and (self.phases or self.init is not None):
            name = "phases" if self.phases else "init"
            raise ValueError(f"{name}: language_model trains no encoder; leave it out")
        if self.init_heads == "continue" and (self.init or "llm:").startswith("llm:"):
            raise ValueError("init_heads: continue needs the folder of an encoder under init; leave it out")
        if self.init_heads == "continue" and self.objective == "distill":
            raise ValueError("init_heads: distill keeps no heads to continue with; leave it out")
        if self.baseline and self.init is None:
            raise ValueError("baseline: is about the encoder under init, and there is none; leave it out")
        sides = [self.image_size, *(phase.image_size for phase in self.phases)]
        for number, (before, side) in enumerate(pairwise(sides)):
            if before is not None and side <= before:
                raise ValueError(
                    f"phases.{number}.image_size: expected more than the {before} px of the stage before, found {side}"
                )
            if self.phases[number].local_size is not None and self.objective != "dinov2":
                raise ValueError(f"phases.{number}.local_size: {self.objective} has no local crops; leave it out")
        self.stages()  # raises for what no stage can be
        return self

    def stage(self) -> StageConfig:
        """The main stage that this configuration describes, over the whole model as one part."""
        part: Part = "text" if self.objective == "language_model" else "vision"
        rate = self._rate(self.learning_rate, self.batch_size)
        return StageConfig(
            name=self.objective,
            train={part: rate},
            steps=self.steps,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            final_ratio=self._final_ratio(rate),
            schedule_steps=self.schedule_steps,
            data=self.data,
            clip_norm=self.clip_norm,
            clip_per_module=self.clip_per_module,
        )

    def stages(self) -> list[StageConfig]:
        """The main stage and its phases, in order."""
        return [self.stage(), *(self._phase(phase) for phase in self.phases)]

    def _phase(self, phase: PhaseConfig) -> PhaseStage:
        """What the phase says over what the main stage is; courses of the main stage are compressed into its steps."""
        main = self.stage()
        said: dict[str, Any] = {name: value for name, value in phase if value is not None}
        learning_rate = said.pop("learning_rate", self.learning_rate)
        rate = self._rate(learning_rate, said.get("batch_size", self.batch_size))
        said |= {
            "name": f"{self.objective}-{phase.image_size}px",
            "train": dict.fromkeys(main.train, rate),
            "final_ratio": self._final_ratio(rate),
        }
        if learning_rate != self.learning_rate:
            optimizer = main.optimizer or self.training.optimizer
            muon = optimizer.muon_learning_rate * learning_rate / self.learning_rate
            said["optimizer"] = optimizer.model_copy(update={"muon_learning_rate": muon})
        said.setdefault("warmup_steps", main.warmup_steps * phase.steps // main.steps)
        if main.schedule_steps is not None:
            said["schedule_steps"] = max(1, main.schedule_steps * phase.steps // main.steps)
        return PhaseStage(**(dict(main) | said))

    def _rate(self, learning_rate: float, batch_size: int) -> float:
        """A learning rate of the recipe, for batches of this size."""
        return learning_rate * math.sqrt(batch_size / self.base_batch_size) if self.base_batch_size else learning_rate

    def _final_ratio(self, rate: float) -> float:
        """Share of the learning rate `rate` that is left at the end. Raises ValueError for two answers, or a rise."""
        if self.final_learning_rate is None:
            return self.final_ratio
        if self.final_ratio:
            raise ValueError("final_ratio and final_learning_rate say the same; leave one out")
        if self.final_learning_rate > rate:
            raise ValueError(f"final_learning_rate: expected at most {rate:g}, found {self.final_learning_rate:g}")
        return self.final_learning_rate / rate
