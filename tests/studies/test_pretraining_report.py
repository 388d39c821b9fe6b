"""The report of a pretraining run: what it says, shows and leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from unclipped.cli.app import app
from unclipped.studies.plots import LinePlot, joined_curve, line_plot
from unclipped.studies.pretraining_report import write_pretraining_report
from unclipped.studies.report import ReportData
from unclipped.training.config import PhaseConfig, PretrainConfig

TINY: dict[str, Any] = {
    "objective": "dinov2",
    "shape": {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "data": {"sources": [{"source": "generated:shapes", "limit": 8}]},
    "image_size": 32,
    "steps": 3,
    "batch_size": 4,
    "dinov2": {"prototypes": 8, "head_hidden": 16, "bottleneck": 8, "local_crops": 1, "local_size": 16},
    "training": {"log_every_steps": 1, "threads": 1},
}


def run_folder(folder: Path, *, warnings: bool = False, health: bool = True) -> PretrainConfig:
    rows = []
    for step in range(1, 5):
        row: dict[str, Any] = {
            "stage_index": 0, "stage": "dinov2", "step": step, "loss": 5.0 - step, "parts": {"dino": 3.0, "koleo": 1.0},
            "learning_rates": {"vision": 1e-3 * step}, "gradient_norm": 2.0, "samples_per_second": 10.0,
            "tokens_per_second": 100.0, "data_waiting_share": 0.25, "seconds": 1.0 * step,
        }  # fmt: skip
        if health and step % 2:
            row["health"] = {
                "rank": 3.5 + step,
                "spread": 0.5,
                "images": 8.0,
                "teacher_entropy": 0.4,
                "prototypes": 6.0,
            }
        if health:
            row["gradient_norms"] = {"dino_head": 1.5, "trunk": 1.3}
            row["schedules"] = {"weight_decay.vision": 0.04 * step, "teacher_momentum": 0.994}
        if warnings and step == 3:
            row["warnings"] = ["features are nearly constant <b>; likely cause: x"]
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {
        "name": "dinov2", "steps": 4, "batch_size": 8, "seconds": 4.0, "final_loss": 1.0,
        "parameters": {"vision": {"trainable": 10, "total": 10}, "all": {"trainable": 10, "total": 10}},
        "samples_per_second": {"median": 10.0, "lower_quartile": 9.0, "upper_quartile": 11.0},
    }  # fmt: skip
    total = {"seconds": 4.0, "device_hours": 0.001, "flops": 1e9, "peak_memory_bytes": 2**30}
    (folder / "training.json").write_text(json.dumps({"finished": True, "stages": [entry], "total": total}))
    return PretrainConfig(**(TINY | {"steps": 4, "batch_size": 8}))


def test_the_page_holds_curves_health_pictures_and_what_they_cannot_say(tmp_path: Path) -> None:
    config = run_folder(tmp_path)
    pictures = tmp_path / "pictures" / "00-dinov2"
    pictures.mkdir(parents=True)
    for name in ("patches-end", "views", "patches-start"):
        Image.new("RGB", (9, 9), "red").save(pictures / f"{name}.png")
    text = write_pretraining_report(config, tmp_path, title="Pretraining: mine").read_text(encoding="utf-8")
    for part in (
        "Parts of the loss", "Effective rank", "Prototypes in use", "Gradient norm", "Learning rate",
        "dino head", "Schedules", "weight decay, vision", "teacher momentum",
        "25 % of the time", "from 4.000 to 1.000", "from 4.5 to 6.5", "eval-encoder", "32 samples",
    ):  # fmt: skip
        assert part in text, part
    order = [text.index(word) for word in ("after augmentation", "before the first step", "after the last step")]
    assert order == sorted(order)
    assert text.count("data:image/png;base64,") == 3
    assert "warnings" not in text.split("</style>")[1]


def with_a_phase(tmp_path: Path) -> PretrainConfig:
    """A run folder whose four steps are followed by two of a phase at 64 px."""
    config = run_folder(tmp_path)
    config = config.model_copy(update={"phases": (PhaseConfig(image_size=64, steps=2, batch_size=4),)})
    record = json.loads((tmp_path / "training.json").read_text())
    more = {"name": "dinov2-64px", "steps": 2, "batch_size": 4, "final_loss": 0.25, "notes": ["images of 64×64 px"]}
    record["stages"].append(record["stages"][0] | more)
    (tmp_path / "training.json").write_text(json.dumps(record))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step, loss in ((1, 0.75), (2, 0.25)):
            row = {**rows[step], "stage_index": 1, "stage": "dinov2-64px", "step": step, "loss": loss}
            file.write(json.dumps(row) + "\n")
    return config


def test_a_phase_has_its_own_words_steps_and_pictures(tmp_path: Path) -> None:
    config = with_a_phase(tmp_path)
    for stage in ("00-dinov2", "01-dinov2-64px"):
        (tmp_path / "pictures" / stage).mkdir(parents=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / stage / "views.png")
    text = write_pretraining_report(config, tmp_path, title="t").read_text(encoding="utf-8")
    for part in (
        "on 32 samples in 4.0 s, then 8 samples in 4.0 s",
        "from 4.000 to 1.000 in dinov2.", "from 0.750 to 0.250 in dinov2-64px.", "dinov2-64px: images of 64×64 px",
        "dinov2: Images as the objective gets them", "dinov2-64px: Images as the objective gets them",
        "at the last of 6 steps", "median of dinov2-64px",
    ):  # fmt: skip
        assert part in text, part


def test_the_loss_of_a_phase_is_drawn_at_the_steps_of_the_other_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_a_phase(tmp_path)
    written: list[ReportData] = []
    monkeypatch.setattr("unclipped.studies.pretraining_report.write_report", lambda _, data: written.append(data))
    write_pretraining_report(config, tmp_path, title="t")
    norms = next(plot for plot in written[0].plots if plot.title == "Gradient norm")
    steps, losses, _ = joined_curve(written[0].curves["model"])
    assert steps == [step for step, _ in norms.lines["norm"]] == [1, 2, 3, 4, 5, 6]
    assert losses == [4.0, 3.0, 2.0, 1.0, 0.75, 0.25]


def test_warnings_stand_on_the_page_escaped(tmp_path: Path) -> None:
    text = write_pretraining_report(run_folder(tmp_path, warnings=True), tmp_path, title="t").read_text(
        encoding="utf-8"
    )
    assert "features are nearly constant &lt;b&gt;" in text
    assert "There were warnings" in text


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    config = run_folder(tmp_path, health=False)
    text = write_pretraining_report(config, tmp_path, title="t").read_text(encoding="utf-8")
    assert "Effective rank" not in text
    assert "effective rank" not in text.lower()
    assert "<img" not in text
    assert "Schedules" not in text


@pytest.mark.parametrize("narrow", [False, True])
def test_line_plots_leave_out_what_is_not_finite(narrow: bool) -> None:
    points = [(1, 1.0), (2, float("nan")), (3, 200.0)]
    text = line_plot(LinePlot("A & B", {"one": points, "two": points}, "value"), narrow=narrow)
    assert text.startswith('<svg role="img" aria-label="A &amp; B: one, two against step"')
    assert "nan" not in text


def test_the_command_ends_with_a_report(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(TINY | {"kind": "pretrain", "description": "What it is for."}))
    result = CliRunner().invoke(app, ["pretrain", str(recipe), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What it is for." in text
    assert "Teacher entropy" in text
    assert text.count("data:image/png;base64,") == 3
    assert f"unclipped eval-encoder {tmp_path / 'run' / 'model'}" in text
