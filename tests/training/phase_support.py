"""Tiny pretrainings of every encoder objective, in phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pair_support import VIT, write_pairs

from unclipped.data.config import DataConfig, SourceConfig
from unclipped.training.config import OptimizerConfig, PretrainConfig, TokenizerConfig, TrainingConfig

OBJECTIVES = ("masked_autoencoder", "dinov2", "distill", "captioning", "contrastive", "sigmoid", "coca")
LLM = {
    "model_type": "unclipped_llm_encoder",
    "patch_size": 8,
    "text_config": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip
PHASES = ({"image_size": 32, "steps": 3, "learning_rate": 1e-3},)


def kind_of(objective: str) -> Any:
    """The objective's class."""
    from unclipped.objectives.base import OBJECTIVES as REGISTERED
    from unclipped.training import captioning_pretraining, dino_pretraining, distill_pretraining  # noqa: F401

    return REGISTERED.get(objective)


def make_job(config: PretrainConfig) -> Any:
    """The job that `pretrain` runs."""
    from unclipped.training.captioning_pretraining import captioning_job
    from unclipped.training.dino_pretraining import dinov2_job
    from unclipped.training.distill_pretraining import distill_job
    from unclipped.training.image_pretraining import masked_autoencoder_job
    from unclipped.training.pair_pretraining import comparison_job

    jobs = {"captioning": captioning_job, "dinov2": dinov2_job, "distill": distill_job,
            "masked_autoencoder": masked_autoencoder_job}  # fmt: skip
    return jobs.get(config.objective, comparison_job)(config)


def tiny(objective: str, folder: Path, **fields: Any) -> PretrainConfig:
    """Three steps of `objective` at 16 px, then three at 32 px, on pairs and with a teacher that lie in `folder`."""
    pairs = folder / "pairs"
    if not pairs.exists():
        write_pairs(pairs)
    given: dict[str, Any] = {
        "shape": VIT,
        "image_size": 16,
        "phases": PHASES,
        "data": DataConfig(sources=(SourceConfig(source=str(pairs)),)),
        "tokenizer": TokenizerConfig(vocabulary_size=280),
        "pairs": {"context_length": 12, "text_width": 16, "text_layers": 1, "text_heads": 2, "embedding_size": 8,
                  "decoder_layers": 1, "caption_queries": 2},
        "captioning": {"width": 16, "layers": 1, "heads": 2},
        "masked_autoencoder": {"decoder_width": 16, "decoder_blocks": 1, "mask_ratio": 0.5},
        "dinov2": {"local_crops": 1, "local_size": 8, "prototypes": 12, "head_hidden": 16, "bottleneck": 8,
                   "centring": "ema", "teacher_momentum": (0.5, 1.0), "teacher_temperature_steps": 2},
        "steps": 3,
        "batch_size": 4,
    }  # fmt: skip
    if objective == "masked_autoencoder":
        given["shape"] = VIT | {"model_type": "vit"}
    if objective == "distill":
        given["distill"] = {"teacher": teacher(folder / "teacher")}
        given["smallest_window"] = 12
    training: dict[str, Any] = {"optimizer": OptimizerConfig(weight_decay=0.1), "log_every_steps": 1, "threads": 1}
    training |= {"device": "cpu"} | fields.pop("training", {})
    given |= fields
    return PretrainConfig(objective=objective, training=TrainingConfig(**training), **given)  # type: ignore[arg-type]


def teacher(folder: Path) -> str:
    """An encoder of 2×2 patches at 24 px, as a folder."""
    import torch

    from unclipped.images.config import ImageRule
    from unclipped.objectives.trunk import build_trunk, save_trunk

    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            trunk = build_trunk(VIT | {"hidden_size": 24, "patch_size": 12}, image_size=24)
        rule = ImageRule(rule="squash", size=(24, 24), patch_size=(12, 12), mean=(0.2, 0.5, 0.4), std=(0.3, 0.2, 0.5))
        save_trunk(trunk, folder, rule)
    return str(folder)
