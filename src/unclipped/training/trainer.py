"""The one trainer: transformers' loop with our batches, optimiser, metrics, checkpoints and interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer

from unclipped.core.errors import CheckpointError, UnclippedError, UsageError
from unclipped.objectives.base import Batch, Counts, Objective
from unclipped.objectives.health import CollapseDetector, undisturbed
from unclipped.training import checkpoint as checkpoints
from unclipped.training.batches import StageBatches, StageLoader
from unclipped.training.clipping import clip_each, joint_norm, parameters_by_module
from unclipped.training.config import OptimizerConfig, StageConfig, TrainingConfig
from unclipped.training.device import trainer_arguments
from unclipped.training.interrupt import StopRequest, TrainingInterrupted
from unclipped.training.optim import build_optimizer, build_scheduler, learning_rates, weight_decays
from unclipped.training.parallel import any_rank, load_whole, shard_optimizer_state, sum_over_ranks, whole
from unclipped.training.progress import Reporter
from unclipped.training.sparse import SparseSteps

HEALTH_EVERY_LOGS = 10
"""Lines of metrics from one measurement of an encoder's health to the next."""


class UnclippedTrainer(Trainer):
    """Trains one objective through one stage.

    Everything that decides the weights (batches, learning rates, random state, optimiser state) is a function of the
    seed, the stage and the step, or lies in the checkpoint: a resumed run equals an unbroken one bit for bit.
    """

    model: Objective

    def __init__(
        self,
        objective: Objective,
        stage: StageConfig,
        training: TrainingConfig,
        batches: StageBatches,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        folder: Path,
        stage_index: int,
        seed: int,
        reporter: Reporter,
        stop: StopRequest,
        identity: dict[str, Any] | None = None,
        entry: dict[str, Any] | None = None,
        pattern: SparseSteps | None = None,
    ) -> None:
        """`folder`: where checkpoints go. `identity` (settings that a resumed run must share) and `entry` (what is
        recorded about the stage so far) are stored in checkpoints as they are. `pattern`: which steps are sparse."""
        arguments = trainer_arguments(stage, device, folder=folder, seed=seed, micro_size=batches.micro_size)
        self.stage, self.training, self.batches = stage, training, batches
        self.autocast_dtype, self.folder, self.stage_index = autocast, folder, stage_index
        self.reporter, self.stop, self.identity = reporter, stop, identity or {}
        self.entry, self.last_loss, self.pattern = entry or {}, math.nan, pattern
        super().__init__(model=objective, args=arguments)
        self.callback_handler.callbacks = [  # keep the flow control, drop the printing of log rows
            callback for callback in self.callback_handler.callbacks if type(callback).__name__ == "DefaultFlowCallback"
        ]
        self.objective = objective
        self.collapse = CollapseDetector()
        self.seconds_before = 0.0
        """Wall time of this stage in earlier runs that were interrupted."""
        self.rates: list[float] = []
        """Samples per second of each window of steps that was logged in this process."""
        self._resumed: dict[str, Any] | None = None
        self._last_step = 0
        self._start_window()

    # Data and optimiser

    def get_train_dataloader(self) -> Any:
        return StageLoader(
            self.batches,
            lambda: self.state.global_step,
            workers=self.training.workers,
            pin_memory=self.args.device.type == "cuda",
        )

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """The stage's own optimiser settings, else the run's."""
        return self.stage.optimizer or self.training.optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.objective, self.stage, self.optimizer_config, self.objective.part_of)
            self.plain_optimizer = self.optimizer  # without the wrapper that accelerate puts around it
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = build_scheduler(self.plain_optimizer, self.stage, self.optimizer_config)
        return self.lr_scheduler

    # One step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        asked = time.perf_counter()
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - asked
        self._sample_ids = [str(name) for batch in batches for name in batch.get("sample_ids", [])]
        self._newest_batch = batches[-1]
        for batch in batches:
            self._num_samples += self.objective.num_samples(batch)
            self._num_tokens += self.objective.num_tokens(batch)
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Counts:  # type: ignore[override]
        """Items that the loss is divided by, over all micro-batches and processes."""
        started = time.perf_counter()
        totals: Counts = {}
        for batch in batch_samples:
            for name, count in self.objective.count(batch).items():
                totals[name] = totals[name] + count if name in totals else count
        counts = {name: count.to(device) for name, count in sum_over_ranks(totals, device).items()}
        self._waited -= time.perf_counter() - started  # within the time of `get_batch_samples`, but no data is awaited
        return counts

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts: Counts | None = num_items_in_batch or None
        if self.pattern is not None:
            self.pattern.start_step(self.state.global_step)
        outputs = model(counts=counts, **{key: value for key, value in inputs.items() if key != "sample_ids"})
        loss = outputs["loss"]
        if not loss.requires_grad:
            raise UsageError(
                f"stage '{self.stage.name}', step {self.state.global_step + 1}: the loss does not depend on the "
                f"trained parts ({', '.join(self.stage.train)}); without images in a batch only text can learn"
            )
        processes = self.args.world_size
        # Counted losses are shares that add up; plain means are averaged.
        share = 1.0 if counts else 1.0 / (self.current_gradient_accumulation_steps * processes)
        for name, value in {"loss": loss, **outputs["parts"]}.items():
            value = value.detach() * share
            self._step_parts[name] = self._step_parts[name] + value if name in self._step_parts else value
        self.loss_is_scaled_for_ga = bool(counts)
        if counts and processes > 1:
            loss = loss * processes  # gradients are averaged over processes, counted losses must be summed
        return (loss, outputs) if return_outputs else loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.autocast_dtype, cache_enabled=bool(cache_enabled))

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # measured once for each stage instead, see measure.py

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self.stage.clip_per_module:
            return super()._clip_grad_norm(model)
        self._step_norms = clip_each(parameters_by_module(self.objective), self.args.max_grad_norm)
        return joint_norm(self._step_norms)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Looking at a loss waits for the device, which costs nothing on the CPU only.
        if self.args.device.type == "cpu":
            self._stop_before_update(norm)
        return norm

    def _stop_before_update(self, norm: Any) -> None:
        """Save the state before this step, and raise, when its loss or gradient is not finite on any process."""
        step = self.state.global_step + 1
        problem = self._not_finite(step, self._sample_ids, self._step_parts, norm)
        if not any_rank(problem is not None, self.args.device):
            return
        saved = f"; saved the state before this step: {self.write_checkpoint()}" if step > 1 else ""
        raise UnclippedError(
            (problem or f"stage '{self.stage.name}', step {step}: loss or gradient of another process is not finite")
            + saved
        )

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Accumulate micro-batches of a sharded model without talking to the other processes."""
        self.objective.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self.objective.set_requires_gradient_sync(True)  # type: ignore[operator]

    # After a step

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, *_: Any, **__: Any) -> None:
        step = self.state.global_step
        if step == self._last_step:  # the loop calls once more when it ends
            return
        self._last_step = step
        is_last, is_logged = step == self.stage.steps, step % self.training.log_every_steps == 0
        if is_logged or is_last:
            self._schedules = self._decays_used | self.objective.schedules()
        self.objective.after_step()
        self._window_steps += 1
        self._norm_sum = self._norm_sum + grad_norm
        for sums, values in ((self._sums, self._step_parts), (self._module_norms, self._step_norms)):
            for name, value in values.items():
                sums[name] = sums[name] + value if name in sums else value
        if self.args.device.type != "cpu":  # there every step was looked at before its update
            self._unchecked.append((step, self._sample_ids, self._step_parts, grad_norm))
        self._step_parts, self._step_norms = {}, {}
        if is_logged or is_last:
            self._check_finite()
            self._log(step)
        is_asked = self.stop.is_set
        if self.args.world_size > 1 and (is_logged or self.args.device.type == "cpu"):
            is_asked = any_rank(is_asked, self.args.device)
        elif self.args.world_size > 1:
            is_asked = False  # all processes must stop at the same step: wait for the next logged one
        every = self.training.save_every_steps
        if not is_last and (is_asked or (every is not None and step % every == 0)):
            self._check_finite()
            path = self.write_checkpoint()
            if is_asked:
                self.reporter.end_stage()
                raise TrainingInterrupted(
                    f"interrupted in stage '{self.stage.name}' after step {step} of {self.stage.steps}; saved {path}. "
                    "Go on with the same command and --resume"
                )

    def _check_finite(self) -> None:
        for row in self._unchecked:
            if (problem := self._not_finite(*row)) is not None:
                raise UnclippedError(problem)
        self._unchecked = []

    def _not_finite(self, step: int, sample_ids: list[str], parts: dict[str, Tensor], norm: Any) -> str | None:
        """What is wrong with the numbers of a step, and what to do; None when they are finite."""
        for what, value in (("loss", parts["loss"]), ("gradient norm", norm)):
            if math.isfinite(float(value)):
                continue
            names = [name for name, part in parts.items() if name != "loss" and not math.isfinite(float(part))]
            if names:
                what += f" (in {' and '.join(names)})"
            shown = ", ".join(sample_ids[:8]) + (f" and {len(sample_ids) - 8} more" if len(sample_ids) > 8 else "")
            return (
                f"stage '{self.stage.name}', step {step}: {what} is {float(value)}; samples of the batch: "
                f"{shown}. Lower the learning rate or lengthen the warm-up, or look at these samples"
            )
        return None

    def _start_window(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._norm_sum: Any = 0.0
        self._module_norms: dict[str, Any] = {}
        """Sums of the norms of sub-modules that are clipped by themselves."""
        self._window_steps = self._num_samples = self._num_tokens = 0
        self._window_started = time.perf_counter()
        self._waited = 0.0
        self._step_parts: dict[str, Tensor] = {}
        self._step_norms: dict[str, Any] = {}
        self._unchecked: list[tuple[int, list[str], dict[str, Tensor], Any]] = []
        self._sample_ids: list[str] = []

    def _log(self, step: int) -> None:
        seconds = time.perf_counter() - self._window_started
        sums = {name: float(value) for name, value in sum_over_ranks(self._sums, self.args.device).items()}
        processes = self.args.world_size
        window_steps = self._window_steps
        samples_per_second = processes * self._num_samples / seconds
        self.rates.append(samples_per_second)
        self.last_loss = sums["loss"] / window_steps
        row = {
            "stage_index": self.stage_index,
            "stage": self.stage.name,
            "step": step,
            "loss": sums["loss"] / window_steps,
            "parts": {name: value / window_steps for name, value in sums.items() if name != "loss"},
            "learning_rates": self._rates_used,
            "gradient_norm": float(self._norm_sum) / window_steps,
            "samples_per_second": samples_per_second,
            "tokens_per_second": processes * self._num_tokens / seconds,
            "data_waiting_share": min(1.0, self._waited / seconds),
            "seconds": self.seconds_so_far,
        }
        if self._module_norms:
            row["gradient_norms"] = {name: float(value) / window_steps for name, value in self._module_norms.items()}
        if self._schedules:
            row["schedules"] = self._schedules
        if step == self.stage.steps or (step // self.training.log_every_steps) % HEALTH_EVERY_LOGS == 1:
            row |= self._health(step)
        seconds_left = (self.stage.steps - step) * seconds / window_steps
        self.reporter.log(row, steps=self.stage.steps, seconds_left=seconds_left)
        self._start_window()

    def _health(self, step: int) -> dict[str, Any]:
        """`health` of the newest micro-batch where the objective measures it, and new `warnings`, which are also said.

        Weights, gradients and random state stay as they are, so a resumed run still equals an unbroken one.
        """
        if self.training.parallel == "fsdp2" and self.args.world_size > 1:
            return {}  # parts of a sharded objective cannot be called by themselves
        inputs = self._prepare_inputs(self._newest_batch)
        with undisturbed(self.objective, self.args.device), self.autocast_smart_context_manager():
            health = self.objective.health(inputs)
        warnings = self.collapse.check(health)
        for warning in warnings:
            self.reporter.say(f"warning: stage '{self.stage.name}', step {step}: {warning}")
        return ({"health": health} if health else {}) | ({"warnings": warnings} if warnings else {})

    def _get_learning_rate(self) -> float:
        """Called by the loop between the update and the scheduler: the rates and decays that the update used."""
        self._rates_used = learning_rates(self.plain_optimizer)
        has_course = self.optimizer_config.final_weight_decay is not None
        decays = weight_decays(self.plain_optimizer) if has_course else {}
        self._decays_used = {f"weight_decay.{part}": value for part, value in decays.items()}
        return next(iter(self._rates_used.values()))

    @property
    def seconds_so_far(self) -> float:
        """Wall time of this stage, earlier interrupted runs included."""
        return self.seconds_before + time.perf_counter() - self._train_started

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._train_started = time.perf_counter()
        if resume_from_checkpoint is None and self.args.world_size > 1:
            torch.manual_seed(self.args.seed + self.args.process_index)  # processes drop out different units
        self._start_window()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def write_checkpoint(self) -> Path:
        """Save everything that the next step depends on. Raises UnclippedError when it cannot be written."""
        state = {
            "objective": whole(self.objective.state_dict()),
            "optimizer": whole(self.plain_optimizer.state_dict()),
            "scheduler": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "identity": self.identity,
            "entry": self.entry,
            "window": {
                "sums": whole(sum_over_ranks(self._sums, self.args.device)),
                "norm_sum": float(self._norm_sum),
                "module_norms": {name: float(value) for name, value in self._module_norms.items()},
                "steps": self._window_steps,
            },
            "seconds": self.seconds_so_far,
        }
        lean = dataclasses.replace(self.state, log_history=[], stateful_callbacks={})
        return checkpoints.write_checkpoint(
            self.folder,
            stage_index=self.stage_index,
            stage=self.stage.name,
            step=self.state.global_step,
            is_finished=False,
            state=state,
            own_random_state=checkpoints.random_state(self.args.device),
            trainer_state_json=json.dumps(dataclasses.asdict(lean)),
            rank=self.args.process_index,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed = checkpoints.read_state(Path(resume_from_checkpoint))
        try:
            load_whole(self.objective, self._resumed["objective"])
        except RuntimeError as error:
            raise CheckpointError(f"{resume_from_checkpoint}: does not fit the model: {error}") from None
        self.seconds_before = self._resumed["seconds"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return
        parameters = [p for group in self.plain_optimizer.param_groups for p in group["params"]]
        self.plain_optimizer.load_state_dict(shard_optimizer_state(self._resumed["optimizer"], parameters))
        self.lr_scheduler.load_state_dict(self._resumed["scheduler"])  # type: ignore[union-attr]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is None or checkpoint is None:
            return
        state = checkpoints.read_random_state(Path(checkpoint), self.args.process_index)
        checkpoints.restore_random_state(state, self.args.device)
        window, self._resumed = self._resumed["window"], None  # the last to be called: free the state
        if self.args.process_index == 0:
            self._sums = {name: value.to(self.args.device) for name, value in window["sums"].items()}
        self._norm_sum, self._window_steps = window["norm_sum"], window["steps"]
        self._module_norms = window["module_norms"]
        self._last_step = self.state.global_step
