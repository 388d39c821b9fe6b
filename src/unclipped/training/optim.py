"""Optimisers: AdamW alone, or Muon for hidden matrices joined with AdamW for the rest, and the learning-rate course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unclipped.core.errors import UsageError, nearest
from unclipped.objectives.schedules import cosine
from unclipped.training.config import OptimizerConfig, Part, StageConfig
from unclipped.training.muon import Muon
from unclipped.training.rate_factors import rate_factors


class JoinedOptimizer(Optimizer):
    """Several torch optimisers behind the interface of one.

    `param_groups` are dictionaries with the keys of a torch group plus `optimizer` ("adamw" or "muon") and `part`.
    The inner AdamW and Muon hold these very dictionaries and one common `state`, so whatever schedulers, clipping,
    accelerate wrappers or `load_state_dict` do to this object holds for them too.
    """

    KINDS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon}  # noqa: RUF012 (a constant table)

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(groups), defaults={})
        self._join()

    def _join(self) -> None:
        """Build the inner optimisers over the present groups; they fill in their defaults where keys are absent."""
        self._inner: list[Optimizer] = []
        for kind, optimizer_class in self.KINDS.items():
            groups = [group for group in self.param_groups if group["optimizer"] == kind]
            if groups:
                inner = optimizer_class(groups)  # type: ignore[call-arg]  (both classes have defaults for the rest)
                inner.state = self.state
                self._inner.append(inner)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the last act of load_state_dict, which replaces groups and state
        self._join()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises UsageError when it does not name a known `optimizer`."""
        kind = param_group.get("optimizer")
        if kind not in self.KINDS:
            raise UsageError(f"a parameter group names optimizer {kind!r}; {nearest(str(kind), self.KINDS)}")
        super().add_param_group(param_group)
        if hasattr(self, "_inner"):
            self._join()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every group. Returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._inner:
            inner.step()
        return loss


def hidden_matrices(model: nn.Module, part_of: Callable[[str], Part]) -> set[str]:
    """Names of the weights that Muon may update.

    These are 2-D weights of `nn.Linear` modules inside repeated blocks (an element of a ModuleList), or anywhere in a
    connector. Embeddings, patch embeddings, position tables, heads, norms and biases lie outside.
    """
    names = set()
    for module_name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        name = f"{module_name}.weight" if module_name else "weight"
        is_in_block = any(piece.isdigit() for piece in module_name.split("."))
        if module.weight.ndim == 2 and (is_in_block or part_of(name) == "connector"):
            names.add(name)
    return names


def parameter_groups(
    model: nn.Module, stage: StageConfig, config: OptimizerConfig, part_of: Callable[[str], Part]
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters by (part, optimiser, decayed or not, factor on the learning rate), in an order
    fixed by the model.

    Raises UsageError when the stage gives a learning rate to a part that has no trainable parameter, and as
    `rate_factors`.
    """
    matrices = hidden_matrices(model, part_of) if config.name == "muon" else set()
    factors = rate_factors(model, config)
    groups: dict[tuple[str, str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        if part not in stage.train:
            raise UsageError(
                f"stage '{stage.name}': parameter {name} is trainable, but its part '{part}' is not trained"
            )
        kind = "muon" if name in matrices and part in config.muon_parts else "adamw"
        factor = factors.get(id(parameter), 1.0)
        groups.setdefault((part, kind, parameter.ndim >= 2, factor), []).append(parameter)
    for part in stage.train:
        if not any(key[0] == part for key in groups):
            present = sorted({part_of(name) for name, _ in model.named_parameters()})
            raise UsageError(f"stage '{stage.name}': the model has no part '{part}' to train; its parts: {present}")
    return [_group(*key, parameters, stage, config) for key, parameters in groups.items()]


def _group(
    part: str, kind: str, is_matrix: bool, factor: float, parameters: list[nn.Parameter], stage: StageConfig,
    config: OptimizerConfig,
) -> dict[str, Any]:  # fmt: skip
    group: dict[str, Any] = {"params": parameters, "part": part, "optimizer": kind, "factor": factor}
    if kind == "muon":
        return group | {
            "lr": config.muon_learning_rate * config.muon_scale.get(part, 1.0) * factor,  # type: ignore[call-overload]
            "momentum": config.muon_momentum,
            "weight_decay": config.muon_weight_decay,
            "adjust_lr_fn": "original",
        }
    decay = config.weight_decay
    if isinstance(decay, dict):
        decay = decay.get(part, 0.0)  # type: ignore[call-overload]
    return group | {
        "lr": stage.train[part] * factor,  # type: ignore[index]
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": decay if is_matrix else 0.0,
        "is_decayed": is_matrix,
        "fused": all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters),
    }


def build_optimizer(
    model: nn.Module, stage: StageConfig, config: OptimizerConfig, part_of: Callable[[str], Part]
) -> JoinedOptimizer:
    """The optimiser of a stage over the trainable parameters of `model`. Raises UsageError as `parameter_groups`."""
    return JoinedOptimizer(parameter_groups(model, stage, config, part_of))


class Course:
    """Factor on the learning rates as a function of the number of finished steps: linear warm-up, then the schedule."""

    def __init__(self, stage: StageConfig) -> None:
        self.schedule, self.steps, self.warmup_steps = stage.schedule, stage.schedule_length, stage.warmup_steps
        self.final_ratio = stage.final_ratio

    def __call__(self, step: int) -> float:
        """Factor in (0, 1] for the update after `step` finished ones."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        share = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))  # 0..1 of the decay
        falling = 1.0 - share if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return self.final_ratio + (1.0 - self.final_ratio) * falling


class StageScheduler(LambdaLR):
    """Learning rates on the course of a stage, and AdamW's weight decay on half a cosine where it has a final value."""

    def __init__(self, optimizer: Optimizer, stage: StageConfig, config: OptimizerConfig) -> None:
        self.decays, self.decay_steps = (config.weight_decay, config.final_weight_decay), stage.schedule_length
        super().__init__(optimizer, Course(stage))

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        first, final = self.decays
        if final is None:
            return
        assert isinstance(first, float)  # the configuration allows no table of parts beside a final value
        for group in self.optimizer.param_groups:
            if group.get("is_decayed"):
                group["weight_decay"] = cosine(first, final, self.last_epoch, self.decay_steps)


def build_scheduler(optimizer: Optimizer, stage: StageConfig, config: OptimizerConfig | None = None) -> StageScheduler:
    """The scheduler of a stage; one call of `step()` for each optimiser step. `config`: null, the defaults."""
    return StageScheduler(optimizer, stage, config or OptimizerConfig())


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Present learning rate of each part before factors of its layers, and of its hidden matrices under Muon as
    `PART.muon`."""
    return {
        group["part"] + (".muon" if group["optimizer"] == "muon" else ""): float(group["lr"]) / group.get("factor", 1.0)
        for group in optimizer.param_groups
    }


def weight_decays(optimizer: Optimizer) -> dict[str, float]:
    """Present weight decay of the decayed parameters of each part under AdamW."""
    return {group["part"]: float(group["weight_decay"]) for group in optimizer.param_groups if group.get("is_decayed")}
