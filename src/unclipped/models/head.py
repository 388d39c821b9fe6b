"""From hidden states to logits exactly as the language model does it itself, and the loss at supervised places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def finish_logits(logits: Tensor, text_config: Any) -> Tensor:
    """What some language models do after their output layer: scaling (Cohere, Granite), soft capping (Gemma 2).

    (…, vocabulary) -> (…, vocabulary). The same operations in the same order as theirs, so that results are equal bit
    for bit; assembly compares with the language model itself and refuses one that does something else here.
    """
    if (scale := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = logits / cap
        logits = torch.tanh(logits)
        logits = logits * cap
    return logits


def supervised_positions(targets: Tensor, ignored: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Where the next token is supervised, (B, L) bool, and those next tokens, (n,), from `shifted` labels (B, L)."""
    wanted = targets != ignored
    return wanted, targets[wanted]


def shifted(labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """Labels (B, L) moved one place to the left: what each position has to predict; the last one is ignored."""
    return functional.pad(labels[:, 1:], (0, 1), value=ignored)
