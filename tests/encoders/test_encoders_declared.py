"""A saved encoder may declare how its own weights were trained; contrastive ones are then baselines of any family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from unclipped.core.errors import CheckpointError, UsageError
from unclipped.encoders.build import build_encoder, load_encoder
from unclipped.encoders.spec import DECLARED, declare_objective, objective_of

SIZES = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
LLM = {
    "patch_size": 8,
    "text_config": {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {"vit": SIZES, "dinov2": SIZES, "unclipped_llm_encoder": LLM}


def saved(family: str, folder: Path, declared: str | None) -> Path:
    encoder = build_encoder(AutoConfig.for_model(family, **FAMILIES[family]))
    if declared is not None:
        declare_objective(encoder.model.config, declared)  # type: ignore[arg-type] - an unknown one is a case too
    encoder.model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("declared", ["contrastive", "sigmoid"])
def test_a_declared_comparison_with_text_needs_the_baseline_flag(family: str, declared: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "encoder", declared)
    with pytest.raises(UsageError, match=rf"'{family}' was trained by comparing.*\({declared}\).*baseline: true"):
        load_encoder(str(folder))
    encoder, _ = load_encoder(str(folder), baseline=True)
    assert encoder.spec.objective == declared
    assert encoder.spec.needs_baseline_flag
    with pytest.raises(UsageError, match="baseline: true"):  # as when an assembled model is built from its config
        build_encoder(encoder.model.config)
    encoder.model.save_pretrained(tmp_path / "again")  # nor is it lost when the encoder is saved once more
    with pytest.raises(UsageError, match="baseline: true"):
        load_encoder(str(tmp_path / "again"))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_declarations_load_as_they_are(family: str, tmp_path: Path) -> None:
    encoder, _ = load_encoder(str(saved(family, tmp_path, "captioning")))
    assert (encoder.spec.objective, encoder.spec.needs_baseline_flag) == ("captioning", False)


def test_without_a_declaration_the_family_speaks(tmp_path: Path) -> None:
    assert load_encoder(str(saved("vit", tmp_path, None)))[0].spec.objective == "supervised"


def test_a_name_and_left_over_fields_prove_nothing_and_the_line_of_the_page_does(tmp_path: Path) -> None:
    """As docs/import-an-encoder.md says: a classifier made of a masked autoencoder keeps its fields, maybe its name."""
    folder = saved("vit", tmp_path / "webssl-mae300m-full2b-224", None)
    config = json.loads((folder / "config.json").read_text())
    left_over = {"mask_ratio": 0.75, "norm_pix_loss": True, "decoder_hidden_size": 512}
    (folder / "config.json").write_text(json.dumps(config | left_over))
    assert load_encoder(str(folder))[0].spec.objective == "supervised"
    (folder / "config.json").write_text(json.dumps(config | {"unclipped_objective": "self_supervised"}))
    encoder, _ = load_encoder(str(folder))
    assert encoder.spec.objective == "self_supervised"
    assert build_encoder(encoder.model.config).spec.objective == "self_supervised"  # as in an assembled model


def test_a_family_of_baselines_cannot_declare_itself_out() -> None:
    config = PreTrainedConfig(**{DECLARED: "self_supervised"})
    assert objective_of(config, "contrastive") == "contrastive"
    assert objective_of(config, "supervised") == "self_supervised"


def test_an_unknown_declaration_is_refused(tmp_path: Path) -> None:
    folder = saved("vit", tmp_path, "contrastiv")
    with pytest.raises(
        CheckpointError, match=r"unclipped_objective 'contrastiv' is unknown; did you mean 'contrastive'"
    ):
        load_encoder(str(folder))


def test_the_declaration_is_no_tensor_and_changes_no_feature(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved("vit", tmp_path, "contrastive")
    pixels = torch.randn(1, 3, 16, 16)
    plain = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()(pixels).last_hidden_state[:, 1:]
    encoder, _ = load_encoder(str(folder), baseline=True)
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(4, -1)
    torch.testing.assert_close(encoder(patches, torch.tensor([[1, 2, 2]])), plain[0])
