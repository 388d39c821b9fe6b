"""Stages one after the other: the machinery that VLM training and pretraining share, with resume and the record."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from unclipped.core.errors import CheckpointError, UnclippedError, UsageError
from unclipped.core.files import write_json
from unclipped.objectives.base import Objective
from unclipped.training import checkpoint as checkpoints
from unclipped.training import measure
from unclipped.training.batches import Examples, StageBatches, check_shares
from unclipped.training.checkpoint import Position
from unclipped.training.config import StageConfig, TrainingConfig
from unclipped.training.device import choose_device, choose_precision, compile_blocks, uncompile_blocks, world
from unclipped.training.interrupt import StopRequest, TrainingInterrupted
from unclipped.training.parallel import any_rank, barrier, is_distributed, load_whole, shard, whole
from unclipped.training.pretraining_pictures import PICTURES, draw_pictures
from unclipped.training.progress import Reporter
from unclipped.training.record import MODEL, RECORD, TrainingResult, hardware, read_record, verify_model
from unclipped.training.sparse import SparseSteps
from unclipped.training.trainer import UnclippedTrainer

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"

# Settings of the run that may differ when it is resumed, since the weights do not depend on them.
_FREE = {"threads", "workers", "save_every_steps", "log_every_steps", "device"}


@dataclass
class Job:
    """What is trained, as the stages see it; the caller fills it in once for all stages."""

    model: nn.Module
    make_objective: Callable[[StageConfig, dict[str, Any]], Objective]
    """Objective of a stage over `model`, trainable parts set. The dictionary carries auxiliary modules over stages."""
    make_examples: Callable[[StageConfig], Examples]
    """Training examples of a stage."""
    save: Callable[[Path], None]
    """Write the model folder; called on the first process only."""
    measure_text: Callable[[], dict[str, float]] | None = None
    """Perplexity on held-out text, for the record before and after each stage."""
    prepare: Callable[[StageConfig, StageBatches, torch.device], None] | None = None
    """Called before a stage starts (not when it is resumed half-way)."""
    skip: Callable[[StageConfig], str | None] = field(default=lambda stage: None)
    """Why a stage has nothing to learn, if so; it is then recorded and passed over."""
    fit: Callable[[StageConfig], None] = field(default=lambda stage: None)
    """Give the model the shapes that it has after a stage; called before weights of that stage are loaded."""
    notes: list[str] = field(default_factory=list)
    """What there is to say and record when a stage has been prepared; then emptied."""


def run_stages(
    job: Job, stages: Sequence[StageConfig], training: TrainingConfig, output: str | Path, *, resume: bool = False
) -> TrainingResult:
    """Train all stages and write `output`: metrics.jsonl, training.json, checkpoints while it runs, model folders,
    and pictures where an encoder is pretrained.

    The model of the last stage is `output/model`, those of earlier ones `output/stages/NN-NAME`. With `resume` the
    newest checkpoint is gone on from. Raises UsageError for settings that do not fit model, machine or checkpoint,
    TrainingInterrupted after Ctrl-C, UnclippedError when a loss is not finite or a file cannot be written.
    """
    return _Run(job, list(stages), training, Path(output), resume).go()


def stage_seed(training: TrainingConfig, index: int) -> int:
    """Seed of stage `index`: new tensors, the order of batches, units that are dropped."""
    return training.seed * 1000 + index


class _Run:
    def __init__(
        self, job: Job, stages: list[StageConfig], training: TrainingConfig, output: Path, resume: bool
    ) -> None:
        if not stages:
            raise UsageError("no stage to train: give at least one under stages")
        self.job, self.stages, self.training, self.output = job, stages, training, output
        self.device = choose_device(training.device)
        self.autocast = choose_precision(training.precision, self.device)
        self.rank, self.world_size = world()
        for stage in stages:
            check_shares(stage, self.world_size)  # of the last one, too, before the first is trained
        self.is_sharded = training.parallel == "fsdp2" and self.world_size > 1
        if self.is_sharded and training.gradient_checkpointing:
            raise UsageError("training: gradient_checkpointing with fsdp2 is not supported; switch one of them off")
        self.reporter = Reporter(output / METRICS, is_first_process=self.rank == 0)
        self.carried: dict[str, Any] = {}
        self.record = read_record(output / RECORD) if resume else None
        self.position = None
        if resume and not self.is_finished:
            self.position = checkpoints.latest_checkpoint(output / CHECKPOINTS)
            self._check_beginning()

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run in this folder ended."""
        return self.record is not None and self.record["finished"]

    def _check_beginning(self) -> None:
        """Refuse to begin from step 0 in a folder whose run got further; check the checkpoint that there is."""
        if self.position is not None:
            if self.rank == 0 and not checkpoints.verify_checkpoint(self.position):
                self.reporter.say(f"{self.position.folder} was written without digests: damage to it cannot be noticed")
            return
        rows = self.reporter.rows()
        every = self.training.save_every_steps
        is_further = any(row["stage_index"] > 0 or (every is not None and row["step"] > every) for row in rows)
        if is_further or any((self.output / name).exists() for name in (RECORD, MODEL, "stages")):
            raise CheckpointError(
                f"{self.output / CHECKPOINTS}: no checkpoint is there, though training got further; put it back, or "
                "start a new run in another --output"
            )
        if rows:
            self.reporter.say("interrupted before its first checkpoint: training begins again at step 0")

    def go(self) -> TrainingResult:
        if self.is_finished:
            assert self.record is not None
            verify_model(self.output, self.record)
            self.reporter.say("training is finished already; nothing to resume")
            return TrainingResult(self.output, self.output / MODEL, self.record)
        threads_before = torch.get_num_threads()
        if self.training.threads is not None:
            torch.set_num_threads(self.training.threads)
        try:
            self._begin()
            with StopRequest() as stop:
                for index, stage in enumerate(self.stages):
                    if self.position is None or index >= self._next_stage():
                        self._stage(index, stage, stop)
                        self._heed(stop, index)
                result = self._end()
                if any_rank(stop.is_set, self.device):  # in the last step: nothing may follow, such as an evaluation
                    raise TrainingInterrupted(
                        f"interrupted when training had ended; the model is {result.model_folder}. "
                        "Go on with the same command and --resume"
                    )
            return result
        finally:
            self.reporter.end_stage()
            torch.set_num_threads(threads_before)

    def _heed(self, stop: StopRequest, index: int) -> None:
        """Stop between stages when asked to."""
        if any_rank(stop.is_set, self.device) and index + 1 < len(self.stages):
            raise TrainingInterrupted(
                f"interrupted after stage '{self.stages[index].name}', before '{self.stages[index + 1].name}'; "
                f"saved under {self.output / CHECKPOINTS}. Go on with the same command and --resume"
            )

    def _next_stage(self) -> int:
        assert self.position is not None
        return self.position.stage_index + int(self.position.is_finished)

    def _begin(self) -> None:
        fresh = {
            "finished": False,
            "hardware": hardware(self.device, self.autocast, self.world_size),
            "training": self.training.model_dump(mode="json"),
            "stages": [],
        }
        if self.position is None:
            self.reporter.forget_after(-1, 0)
            self.record = fresh
            return
        self.reporter.forget_after(self.position.stage_index, self.position.step)
        self.reporter.say(f"resuming from {self.position.folder}")
        kept = self._next_stage()
        earlier = fresh | (self.record or {})
        if len(earlier["stages"]) < kept:
            raise CheckpointError(
                f"{self.output / RECORD}: expected the record of the {kept} stages before the checkpoint, found "
                f"{len(earlier['stages'])}; put it back, or start a new run in another --output"
            )
        self.record = earlier | {"finished": False, "stages": earlier["stages"][:kept]}
        if self.position.is_finished:
            state = checkpoints.read_state(self.position.folder)
            self._same_settings(state["identity"], self.position)
            self._load_finished(state)

    def _load_finished(self, state: dict[str, Any]) -> None:
        self.job.fit(self.stages[self.position.stage_index])  # type: ignore[union-attr]
        self.job.notes.clear()  # that stage is past, and recorded
        try:
            load_whole(self.job.model, state["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{self.position.folder}: does not fit the model: {error}") from None  # type: ignore[union-attr]
        self.carried["states"] = state["carried"]

    def _identity(self, index: int) -> dict[str, Any]:
        """Settings on which the weights after stage `index` depend."""
        run = self.training.model_dump(mode="json", exclude=_FREE)
        return {"run": run, "stages": [stage.model_dump(mode="json") for stage in self.stages[: index + 1]]}

    def _same_settings(self, saved: dict[str, Any], position: Position) -> None:
        own = self._identity(position.stage_index)
        for path, was, now in checkpoints.differences(saved, own, ""):
            raise UsageError(
                f"--resume: {path.lstrip('.')} was {was!r} when {position.folder} was written and is {now!r} now; "
                "resume with the same settings, or start a new run in another folder"
            )

    def _stage(self, index: int, stage: StageConfig, stop: StopRequest) -> None:
        assert self.record is not None
        if (reason := self.job.skip(stage)) is not None:
            self.reporter.say(f"stage {stage.name}: passed over, {reason}")
            self.record["stages"].append({"name": stage.name, "passed_over": reason})
            self._finish_stage(index, stage)
            return
        is_resumed = self.position is not None and self.position.stage_index == index
        seed = stage_seed(self.training, index)
        torch.manual_seed(seed)  # new tensors of the stage
        objective = self.job.make_objective(stage, self.carried)
        batches = StageBatches(
            self.job.make_examples(stage),
            stage,
            seed=seed,
            length_grouping=self.training.length_grouping,
            world_size=self.world_size,
            rank=self.rank,
        )
        if is_resumed:
            entry = self._resume_entry()
        else:
            here = torch.device("cpu") if self.is_sharded else self.device  # a sharded model may fit no single device
            self.job.model.to(here)
            if self.job.prepare is not None:
                self.job.prepare(stage, batches, here)
            entry = self._new_entry(index, stage, objective, batches)
            self._draw(index, stage, objective, batches, "start")
        if self.job.notes and not is_resumed:
            entry["notes"] = list(self.job.notes)
        self.job.notes.clear()
        for note in entry.get("notes", []):
            self.reporter.say(f"stage {stage.name}: {note}")
        self.reporter.parameter_table(stage.name, entry["parameters"])
        trainer = self._train(index, stage, objective, batches, stop, seed, entry, is_resumed)
        self._complete_entry(entry, trainer)
        self._draw(index, stage, objective, batches, "end")
        if "states" in self.carried:
            self.carried["states"] = {}
        self.record["stages"].append(entry)
        self._finish_stage(index, stage)

    def _resume_entry(self) -> dict[str, Any]:
        state = checkpoints.read_state(self.position.folder)  # type: ignore[union-attr]
        self._same_settings(state["identity"], self.position)  # type: ignore[arg-type]
        return state["entry"]

    def _new_entry(self, index: int, stage: StageConfig, objective: Objective, batches: StageBatches) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": stage.name, "steps": stage.steps, "batch_size": stage.batch_size}
        entry["parameters"] = measure.parameter_table(objective)
        if self.is_sharded:
            per_micro_batch = measure.estimate_flops(objective, batches[0])
            method = "6 · parameters · tokens (vision part: patches; teacher: 2), estimated; attention not included"
        else:
            objective.to(self.device).train()
            per_micro_batch = measure.count_flops(objective, batches[0], self.device, self.autocast)
            method = (
                "matrix products and attention of forward and backward, counted on the first micro-batch; "
                "optimiser and recomputation for gradient checkpointing not included"
            )
        per_step = per_micro_batch * stage.gradient_accumulation * self.world_size
        entry["flops"] = {"per_step": per_step, "total": per_step * stage.steps, "method": method}
        if self.job.measure_text is not None:
            previous = [e for e in self.record["stages"] if "text_perplexity" in e]  # type: ignore[index]
            before = previous[-1]["text_perplexity"]["after"] if previous else self.job.measure_text()
            entry["text_perplexity"] = {"before": before}
        return entry

    def _draw(
        self,
        index: int,
        stage: StageConfig,
        objective: Objective,
        batches: StageBatches,
        moment: Literal["start", "end"],
    ) -> None:
        if self.rank == 0:
            folder = self.output / PICTURES / f"{index:02d}-{stage.name}"
            draw_pictures(objective, batches, folder, moment=moment)

    def _train(
        self, index: int, stage: StageConfig, objective: Objective, batches: StageBatches, stop: StopRequest, seed: int,
        entry: dict[str, Any], is_resumed: bool,
    ) -> UnclippedTrainer:  # fmt: skip
        trained = objective
        if self.training.gradient_checkpointing:
            _checkpoint_activations(self.job.model, True)
        if self.is_sharded:
            _start_process_group(self.device)
            trained = shard(copy.deepcopy(objective).to(self.device))  # the caller's model stays whole
        compiled = compile_blocks(trained, self.training.compile, self.device)
        measure.start_memory(self.device)
        if stage.sparse is not None and self.training.compile:
            raise UsageError(f"stage '{stage.name}': sparse and training.compile do not go together; switch one off")
        pattern = SparseSteps(trained.model, stage.sparse, seed)
        trainer = UnclippedTrainer(
            trained, stage, self.training, batches, device=self.device, autocast=self.autocast,
            folder=self.output / CHECKPOINTS, stage_index=index, seed=seed, reporter=self.reporter, stop=stop,
            identity=self._identity(index), entry=entry, pattern=pattern,
        )  # fmt: skip
        done = self.position.step if is_resumed else 0  # type: ignore[union-attr]
        self.reporter.start_stage(stage.name, stage.steps, done)
        try:
            with pattern:
                trainer.train(str(self.position.folder) if is_resumed else None)  # type: ignore[union-attr]
                entry |= pattern.record()
        finally:
            uncompile_blocks(compiled)
            if self.training.gradient_checkpointing:
                _checkpoint_activations(self.job.model, False)
        self.reporter.end_stage()
        if self.is_sharded:
            objective.load_state_dict(whole(trained.state_dict()))
        return trainer

    def _complete_entry(self, entry: dict[str, Any], trainer: UnclippedTrainer) -> None:
        seconds = trainer.seconds_so_far
        entry["seconds"] = seconds
        entry["device_hours"] = seconds * self.world_size / 3600
        entry["peak_memory"] = measure.peak_memory(self.device)
        entry["samples_per_second"] = measure.spread(trainer.rates)
        entry["final_loss"] = trainer.last_loss
        entry["wrapped_as"] = type(trainer.model_wrapped).__name__
        if self.job.measure_text is not None:
            entry["text_perplexity"]["after"] = self.job.measure_text()

    def _finish_stage(self, index: int, stage: StageConfig) -> None:
        """Model folder, record, then the checkpoint that lets the next stage start here."""
        assert self.record is not None
        is_last = index == len(self.stages) - 1
        self.job.model.eval()
        if self.rank == 0:
            folder = self.output / MODEL if is_last else self.output / "stages" / f"{index:02d}-{stage.name}"
            self.job.save(folder)
            write_json(self.output / RECORD, self.record)
        if not is_last:
            checkpoints.write_checkpoint(
                self.output / CHECKPOINTS,
                stage_index=index,
                stage=stage.name,
                step=stage.steps,
                is_finished=True,
                state={
                    "model": whole(self.job.model.state_dict()),
                    "carried": {
                        name: whole(module.state_dict())
                        for name, module in self.carried.items()
                        if isinstance(module, nn.Module)
                    },
                    "identity": self._identity(index),
                },
                own_random_state={},
                trainer_state_json="{}",
                rank=self.rank,
            )

    def _end(self) -> TrainingResult:
        assert self.record is not None
        entries = [entry for entry in self.record["stages"] if "seconds" in entry]
        self.record |= {
            "finished": True,
            "total": {
                "seconds": sum(entry["seconds"] for entry in entries),
                "device_hours": sum(entry["device_hours"] for entry in entries),
                "flops": sum(entry["flops"]["total"] for entry in entries),
                "peak_memory_bytes": max((entry["peak_memory"]["bytes"] for entry in entries), default=0),
            },
        }
        barrier()
        if self.rank == 0:
            self.record["model_files"] = checkpoints.digests_of(self.output / MODEL)
            write_json(self.output / RECORD, self.record)
            (self.output / checkpoints.NEWEST).unlink(missing_ok=True)
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
        barrier()  # the model folder is there for every process
        return TrainingResult(self.output, self.output / MODEL, self.record)


def _checkpoint_activations(model: nn.Module, is_on: bool) -> None:
    if not hasattr(model, "activation_checkpointing_enable"):
        raise UnclippedError(
            f"training.gradient_checkpointing: {type(model).__name__} does not offer it; switch it off"
        )
    if is_on:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    else:
        model.activation_checkpointing_disable()  # type: ignore[operator]


def _start_process_group(device: torch.device) -> None:
    """Sharding comes before the Trainer, which would otherwise be the one to connect the processes."""
    if not is_distributed():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
