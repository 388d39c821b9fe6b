"""Pretraining of one part alone: a language model from text, or a vision encoder from images."""

from __future__ import annotations

from pathlib import Path

from unclipped.data.inputs import check_inputs
from unclipped.training.config import PretrainConfig
from unclipped.training.device import world
from unclipped.training.record import TrainingResult
from unclipped.training.stages import run_stages


def pretrain(config: PretrainConfig, output: str | Path, *, resume: bool = False) -> TrainingResult:
    """Train what `config` describes and write the run folder `output`; the model is `output/model`.

    `language_model`: a folder that AutoModelForCausalLM and AutoTokenizer load. `masked_autoencoder`: a ViTMAE encoder
    (the shape `vit_mae`) or one of its shape's family, with its preprocessor, as from here on. `dinov2`: the teacher's
    encoder. `distill`: the student. `captioning`: the encoder, with its decoder in `caption_decoder/`. `contrastive`,
    `sigmoid`, `coca`: an encoder that declares itself a baseline, with its text side in `text_side/`. Raises as
    `run_stages`.
    """
    if world()[0] == 0:
        check_inputs(Path(output), config, resume=resume)
    if config.objective == "language_model":
        from unclipped.training.text_pretraining import language_model_job as make_job
    elif config.objective == "dinov2":
        from unclipped.training.dino_pretraining import dinov2_job as make_job
    elif config.objective == "captioning":
        from unclipped.training.captioning_pretraining import captioning_job as make_job
    elif config.objective in ("contrastive", "sigmoid", "coca"):
        from unclipped.training.pair_pretraining import comparison_job as make_job
    elif config.objective == "distill":
        from unclipped.training.distill_pretraining import distill_job as make_job
    else:
        from unclipped.training.image_pretraining import masked_autoencoder_job as make_job
    return run_stages(make_job(config), config.stages(), config.training, output, resume=resume)
