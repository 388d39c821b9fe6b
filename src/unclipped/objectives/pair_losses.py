"""Losses that compare images with captions: InfoNCE (CLIP, arXiv 2103.00020) and the pairwise sigmoid (SigLIP,
arXiv 2303.15343).

Both take unit-length embeddings of the pairs of one process, row i of images belonging to row i of texts, compare them
with the pairs of all processes, and return the mean over the pairs of this process: the mean of these over processes
is the loss of the joined batch. With `chunk`, at most so many rows of the similarity matrix exist at a time, in the
backward pass too, where they are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unclipped.objectives.dino_losses import wide
from unclipped.objectives.exchange import gather_rows, num_processes, pass_on, process_index

INFO_NCE_LOG_SCALE = math.log(1 / 0.07)
MOST_LOG_SCALE = math.log(100)
SIGMOID_LOG_SCALE, SIGMOID_BIAS = math.log(10), -10.0


def unit(features: Tensor) -> Tensor:
    """(…, D) of unit length, in at least float32."""
    return F.normalize(wide(features), dim=-1)


@torch.no_grad()
def clamp_log_scale(log_scale: nn.Parameter) -> None:
    """Hold the factor on cosines at 100 or less, as InfoNCE wants it after each step."""
    log_scale.clamp_(max=MOST_LOG_SCALE)


def info_nce(images: Tensor, texts: Tensor, log_scale: Tensor, *, chunk: int | None = None) -> Tensor:
    """Mean of the cross-entropies of finding an image's caption among all captions, and a caption's image.

    images, texts (B, D); log_scale (1,). Each process computes its own B rows against the rows of all.
    """
    first = process_index() * len(images)
    scale = wide(log_scale).exp()
    total = _found(images, gather_rows(texts), scale, first, chunk) + _found(
        texts, gather_rows(images), scale, first, chunk
    )
    return total / (2 * len(images))


def sigmoid_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, *, chunk: int | None = None) -> Tensor:
    """Σ softplus(∓(scale · cosine + bias)) over all combinations, minus for pairs that belong together, divided by B.

    images, texts (B, D); log_scale, bias (1,). Each process keeps its images; texts go round the ring of processes, so
    no process holds those of all. Received texts hold no partner of the images here.
    """
    scale = wide(log_scale).exp()
    total = _judged(images, texts, scale, bias, chunk, are_partners=True)
    for _ in range(num_processes() - 1):
        texts = pass_on(texts)
        total = total + _judged(images, texts, scale, bias, chunk, are_partners=False)
    return total / len(images)


def _found(rows: Tensor, candidates: Tensor, scale: Tensor, first: int, chunk: int | None) -> Tensor:
    """Σ over rows of the cross-entropy whose answer for row i is candidate `first` + i."""

    def block(some: Tensor, candidates: Tensor, scale: Tensor, start: int) -> Tensor:
        with torch.autocast(some.device.type, enabled=False):
            answers = torch.arange(len(some), device=some.device) + first + start
            return F.cross_entropy(scale * (some @ candidates.T), answers, reduction="sum")  # (rows, processes · B)

    return _in_chunks(block, rows, chunk, candidates, scale)


def _judged(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, chunk: int | None, *, are_partners: bool
) -> Tensor:
    """Σ softplus(scale · cosine + bias), with the sign turned for image i and text i when these are partners."""

    def block(some: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
        with torch.autocast(some.device.type, enabled=False):
            scores = scale * (some @ texts.T) + bias  # (rows, B)
            if are_partners:
                rows, signs = torch.arange(len(some), device=some.device), torch.ones_like(scores)
                signs[rows, rows + start] = -1.0
                scores = scores * signs
            return F.softplus(scores).sum()

    return _in_chunks(block, images, chunk, texts, scale, bias)


def _in_chunks(block: Callable[..., Tensor], rows: Tensor, chunk: int | None, *others: Tensor) -> Tensor:
    """Σ of `block(rows[start:start + chunk], *others, start)`, keeping for the backward pass only its arguments."""
    if chunk is None or chunk >= len(rows):
        return block(rows, *others, 0)
    total = rows.new_zeros(())
    for start in range(0, len(rows), chunk):
        some = rows[start : start + chunk]
        total = total + checkpoint(block, some, *others, start, use_reentrant=False, preserve_rng_state=False)
    return total
