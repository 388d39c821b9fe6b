"""Training under a pattern of sparse prefill, with a share of dense steps."""

from __future__ import annotations

from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np

from unclipped.attention.config import SparseTrainingConfig
from unclipped.attention.prefill import SparsePrefill, prefill_with


class SparseSteps:
    """Holds a model under a stage's pattern inside a `with` statement; without a pattern it does nothing."""

    def __init__(self, model: Any, config: SparseTrainingConfig | None, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.hold: SparsePrefill | None = None

    def __enter__(self) -> SparseSteps:
        if self.config is not None:
            self.hold = prefill_with(self.model, self.config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.hold is not None:
            self.hold.close()

    def start_step(self, step: int) -> None:
        """Dense or sparse, as the seed and the number of the step say; the same when training is resumed there."""
        if self.hold is not None and self.config is not None:
            draw = np.random.default_rng([self.seed, step, 21]).random()
            self.hold.pause(bool(draw < self.config.dense_share))

    def record(self) -> dict[str, Any]:
        """For the record of the stage: pattern, and what the layers did at the last sparse step."""
        if self.hold is None or self.config is None:
            return {}
        summary = self.hold.summary()
        last = (
            asdict(summary) if summary is not None else "no batch came without a mask of its own: all steps ran dense"
        )
        return {"sparse": {"dense_share": self.config.dense_share, "last_prefill": last}}
