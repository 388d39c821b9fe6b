"""k-nearest neighbours on frozen features: cosine similarity, votes weighted by exp(similarity / temperature)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from unclipped.core.errors import UsageError

_SIMILARITIES_AT_ONCE = 16_000_000  # 64 MB of float32


def knn_predict(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Predicted classes (queries,) for each number of neighbours in `ks`.

    queries (Q, D), bank (N, D) with labels (N,). A class scores the sum of exp(cosine / temperature) over its members
    among the k nearest (Wu et al., arXiv 1805.01978); the lowest class number wins a tie. Raises UsageError when some
    k is larger than the bank.
    """
    if max(ks) > len(bank):
        raise UsageError(f"knn.k: {max(ks)} neighbours asked for, but only {len(bank)} images to choose from; lower k")
    queries, bank = functional.normalize(queries, dim=-1), functional.normalize(bank, dim=-1)
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk in queries.split(max(1, _SIMILARITIES_AT_ONCE // len(bank))):
        similarity, index = (chunk @ bank.T).topk(max(ks), dim=-1)  # (q, k)
        # The largest similarity is taken off: the votes of one query keep their ratios and cannot overflow.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        members = labels[index]
        for k in ks:
            scores = votes.new_zeros(len(chunk), num_classes)
            scores.scatter_add_(1, members[:, :k], votes[:, :k])
            parts[k].append(scores.argmax(dim=-1))
    return {k: torch.cat(chunks) for k, chunks in parts.items()}
