"""A comparison of objectives that runs in seconds."""

from __future__ import annotations

from typing import Any

from unclipped.core.config import merge

SHAPE = {
    "model_type": "vit", "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
SHAPES = {"source": "generated:shapes", "limit": 8}


def comparison(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "pretrain": {
            "shape": SHAPE, "image_size": 32, "steps": 2, "batch_size": 4, "data": {"sources": [SHAPES]},
            "tokenizer": {"vocabulary_size": 270}, "training": {"log_every_steps": 1, "threads": 1},
            "pairs": {"embedding_size": 8, "context_length": 32, "text_layers": 1, "text_width": 16, "text_heads": 2},
        },
        "arms": {
            "student": {"objective": "distill", "distill": {"teacher": "arm:contrastive", "baseline": True}},
            "contrastive": {"objective": "contrastive"},
        },
    }  # fmt: skip
    return merge(fields, changes)
