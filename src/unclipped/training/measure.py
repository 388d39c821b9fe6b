"""What a run costs and what it forgets: parameters, memory, floating-point operations, device-hours, perplexity."""

from __future__ import annotations

import math
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from unclipped.objectives.base import Batch, Objective
from unclipped.objectives.health import evaluating


def parameter_table(objective: Objective) -> dict[str, dict[str, int]]:
    """`{part: {"trainable", "total"}}` in parameters, and the row `all`; shared tensors count once."""
    table: dict[str, dict[str, int]] = {}
    for name, parameter in objective.named_parameters():
        for part in (objective.part_of(name), "all"):
            row = table.setdefault(part, {"trainable": 0, "total": 0})
            row["total"] += parameter.numel()
            row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return {part: table[part] for part in [*(p for p in table if p != "all"), "all"]}


def start_memory(device: torch.device) -> None:
    """Begin to watch the peak memory of `device`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """`{"bytes", "kind"}`: allocated on the CUDA device since `start_memory`, else the process's highest so far."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "kind": "CUDA memory allocated, peak of the stage"}
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "kind": "resident memory of the process, peak since its start"}


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # Shapes (batch, heads, length, width). Five products: scores again, and those for the gradients of each input.
    batch, heads, queries, width = query
    return 5 * 2 * batch * heads * queries * key[2] * width


def _formulas() -> dict[Any, Callable[..., int]]:
    """torch's counter has no formula for its own CPU attention kernel."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
    }


def count_flops(objective: Objective, batch: Batch, device: torch.device, autocast: torch.dtype | None) -> int:
    """Floating-point operations of forward and backward on `batch` (products of matrices and attention).

    Counted in evaluation mode, in which objectives note nothing for their next step. Leaves gradients empty, and modes
    and the random state as they were.
    """
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "sample_ids"
    }
    with evaluating(objective, device), FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss = objective(**inputs)["loss"]
        if loss.requires_grad:
            loss.backward()
    objective.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def estimate_flops(objective: Objective, batch: Batch) -> int:
    """6 · parameters · tokens, text tokens for the text part and patches for the vision part; attention left out.

    Where all is one part, as in the pretraining of an encoder: 6 · trained and 2 · frozen parameters (a teacher) ·
    tokens. For models that no single process can hold, where `count_flops` cannot run.
    """
    tokens = objective.num_tokens(batch)
    table = parameter_table(objective)
    if len(table) == 2:  # one part, and the row `all`
        return (4 * table["all"]["trainable"] + 2 * table["all"]["total"]) * tokens
    patches = batch["pixel_values"].shape[0] if "pixel_values" in batch else 0
    sizes = {part: row["total"] for part, row in table.items() if part != "all"}
    return 6 * sum(size * (tokens if part == "text" else patches) for part, size in sizes.items())


@torch.no_grad()
def text_perplexity(
    model: nn.Module, blocks: Sequence[Sequence[int]], *, batch_size: int = 16, bytes_per_block: float | None = None
) -> dict[str, float]:
    """Perplexity of a causal model (language or vision-language, without images) on blocks of token ids.

    Gives `perplexity` (per token), `loss` (nats per token), `standard_error` of the loss over blocks, `blocks`,
    `tokens` that were predicted, and `bits_per_byte` when `bytes_per_block`, the mean bytes of a block, is known.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[float] = []
    tokens = 0
    for start in range(0, len(blocks), batch_size):
        ids = torch.tensor([list(block) for block in blocks[start : start + batch_size]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # (batch, length − 1, vocabulary)
        each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (batch, length − 1)
        losses += each.mean(dim=1).tolist()
        tokens += each.numel()
    model.train(was_training)
    loss = statistics.fmean(losses)
    spread = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    found = {
        "perplexity": math.exp(min(loss, 700.0)),
        "loss": loss,
        "standard_error": spread,
        "blocks": len(losses),
        "tokens": tokens,
    }
    if bytes_per_block is not None:
        per_block = tokens / len(losses)
        found["bits_per_byte"] = loss * per_block / math.log(2) / bytes_per_block
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of a rate over the windows in which it was taken."""
    if not values:
        return {}
    if len(values) == 1:
        return {"median": values[0], "lower_quartile": values[0], "upper_quartile": values[0]}
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
