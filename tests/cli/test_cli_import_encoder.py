"""`unclipped import-encoder` as a user runs it, and what its folder is then good for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bad_input_support import unclipped

from support.original_vit import Draw, OriginalVit
from support.tiny_models import tiny_lm
from unclipped.encoders.build import load_encoder
from unclipped.objectives.dino_side import load_dino_heads

SIZES = OriginalVit(is_gated=True, chunks=2)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_teacher_becomes_an_encoder_that_assembles(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {f"backbone.{name}": value for name, value in SIZES.tensors().items()}
    teacher |= {f"dino_head.{name}": value for name, value in Draw(1).head(24, 20, 8, 15).items()}
    torch.save({"teacher": teacher, "iteration": 3}, "teacher.pth")
    command = ("import-encoder", "teacher.pth", "--attention-heads", "3", "--output", "vit")
    outcome = unclipped(monkeypatch, capsys, *command, "--mean", "0.5,0.5,0.4", "--std", "0.2,0.2,0.3")
    assert outcome.status == 0, outcome
    for piece in (
        "encoder     dinov2, ",
        "objective self_supervised",
        "patch 4 px, images 12 px",
        "mean [0.5, 0.5, 0.4], std [0.2, 0.2, 0.3] (given)",
        "dino_head   width 24, hidden 20, bottleneck 8, prototypes 15",
        "left out    iteration: no weights of the model",
        "saved: vit",
    ):
        assert piece in outcome.out, piece
    assert load_encoder("vit")[0].spec.mean == (0.5, 0.5, 0.4)
    assert load_dino_heads("vit").ibot_head is None
    assert {path.name for path in (place / "vit").iterdir()} == {
        "config.json", "dino_heads", "import.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    tiny_lm("lm")
    assembled = unclipped(monkeypatch, capsys, "assemble", "--vision", "vit", "--text", "lm", "--output", "vlm")
    assert assembled.status == 0, assembled
    assert "self_supervised" in assembled.out


def test_a_failed_import_does_not_occupy_its_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(SIZES.tensors() | {"surplus": torch.zeros(1)}, "weights.pth")
    command = ("import-encoder", "weights.pth", "--attention-heads", "3", "--output", "vit")
    assert unclipped(monkeypatch, capsys, *command).status == 1
    assert not (place / "vit").exists()
    outcome = unclipped(monkeypatch, capsys, *command, "--leave-out", "sur*", "--leave-out", "nothing")
    assert outcome.status == 0, outcome
    assert "left out    surplus: as asked for" in outcome.out
