"""Where and how precisely to compute: device, number format, threads, compilation, and the Trainer's arguments."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from unclipped.core.errors import UsageError
from unclipped.training.config import StageConfig


def choose_device(name: str = "auto") -> torch.device:
    """The device that `name` asks for; `auto` takes CUDA, else MPS, else CPU. Raises UsageError when it is absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_present in present.items() if is_present))
    if not present[name]:
        found = ", ".join(kind for kind, is_present in present.items() if is_present)
        raise UsageError(f"training.device: {name} is not available here; found: {found}; use auto")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Autocast format, None for plain fp32. `auto`: bf16 where CUDA supports it."""
    if name == "bf16":
        return torch.bfloat16
    if name == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


def world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun gives them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of encoders and decoders: elements of module lists that hold parameters, outermost only."""
    blocks: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(_has_parameters, module)):
            inside_other = any(module is inner for block in blocks for inner in block.modules())
            if not inside_other:
                blocks.extend(module)
    return blocks


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def compile_blocks(model: nn.Module, choice: bool | str, device: torch.device) -> list[nn.Module]:
    """Compile each block in place when asked (block by block: one short compilation serves all alike layers).

    Names of parameters stay as they are. Returns the compiled blocks for `uncompile_blocks`.
    """
    if choice is False or (choice == "auto" and device.type != "cuda"):
        return []
    blocks = repeated_blocks(model)
    for block in blocks:
        block.compile(dynamic=True)
    return blocks


def uncompile_blocks(blocks: list[nn.Module]) -> None:
    """Undo `compile_blocks`."""
    for block in blocks:
        block._compiled_call_impl = None


def trainer_arguments(
    stage: StageConfig,
    device: torch.device,
    *,
    folder: str | Path,
    seed: int,
    micro_size: int,
) -> TrainingArguments:
    """Arguments of the transformers Trainer for one stage; logging and checkpoints are our own."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=micro_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        max_grad_norm=stage.clip_norm or 0.0,
        seed=seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ignore_data_skip=True,  # the loader starts at the right step by itself
        average_tokens_across_devices=False,  # counts are summed over processes by the trainer itself
        ddp_find_unused_parameters=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would cost one wait for the device each step
        report_to="none",
        disable_tqdm=True,
    )
    _ = arguments.device  # fixes the device, and the number of devices, which we then correct:
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several CUDA devices are used by several processes, not by threads
    return arguments
