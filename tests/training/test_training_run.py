"""Stages of a vision-language model: what is written, recorded, skipped, standardised, and dropped."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_support import assert_equal_weights, weights

from unclipped.core.errors import UnclippedError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.data.mixture import Mixture
from unclipped.models.checkpoint import load_model
from unclipped.training.config import StageConfig, TrainingConfig
from unclipped.training.examples import MixtureExamples
from unclipped.training.progress import Reporter, clock, short
from unclipped.training.run import data_seed, train_stages
from unclipped.training.text import held_out_blocks

MakeModel = Callable[..., tuple[Any, Any]]

DATA = DataConfig(sources=(SourceConfig(source="generated:characters"),))
ALL = {"vision": 1e-3, "connector": 1e-3, "text": 1e-3}
FIRST = StageConfig(name="connector", train={"connector": 1e-2}, steps=2, batch_size=2)
SECOND = StageConfig(name="all", train=ALL, steps=2, batch_size=2, auxiliary={"ctc": 0.5})
TRAINING = TrainingConfig(log_every_steps=1, threads=1)


def test_what_a_run_leaves_behind(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm()
    text = SourceConfig(source="generated:characters", options={"as_text": True})
    held_out = held_out_blocks([text], processor, count=3, length=24)
    assert len(held_out.blocks) == 3
    result = train_stages(model, processor, [FIRST, SECOND], TRAINING, DATA, tmp_path, held_out=held_out)

    loaded, loaded_processor = load_model(result.model_folder)
    assert_equal_weights(loaded, model)
    assert loaded_processor.tokenizer.eos_token == processor.tokenizer.eos_token
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "training.json", "model", "stages"}
    earlier, _ = load_model(tmp_path / "stages" / "00-connector")
    assert not torch.equal(earlier.lm_head.weight, loaded.lm_head.weight)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("connector", 1), ("connector", 2), ("all", 1), ("all", 2)]
    assert set(rows[2]["parts"]) == {"answer", "ctc", "ctc_left_out"}
    assert rows[2]["loss"] == pytest.approx(rows[2]["parts"]["answer"] + 0.5 * rows[2]["parts"]["ctc"], rel=1e-5)

    record = json.loads((tmp_path / "training.json").read_text())
    assert record == result.record
    assert record["finished"]
    assert record["hardware"]["device"] == "cpu"
    first, second = record["stages"]
    assert first["parameters"]["vision"]["trainable"] == first["parameters"]["text"]["trainable"] == 0
    own = sum(p.numel() for p in model.model.connector.parameters())
    assert first["parameters"]["connector"] == {"trainable": own, "total": own}
    assert second["parameters"]["all"]["trainable"] == second["parameters"]["all"]["total"]
    for stage in record["stages"]:
        assert stage["flops"]["total"] == 2 * stage["flops"]["per_step"] > 0
        assert stage["device_hours"] == pytest.approx(stage["seconds"] / 3600)
        assert stage["peak_memory"]["bytes"] > 1e6
        assert stage["samples_per_second"]["lower_quartile"] <= stage["samples_per_second"]["upper_quartile"]
    # The first stage leaves the language model alone, the second does not.
    perplexities = [
        stage["text_perplexity"][when]["perplexity"] for stage in record["stages"] for when in ("before", "after")
    ]
    assert perplexities[0] == perplexities[1] == perplexities[2] != perplexities[3]
    assert first["text_perplexity"]["before"]["bits_per_byte"] > 0


def test_the_ctc_head_is_not_in_the_model_folder(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm()
    names = set(load_file(_saved(model, processor, tmp_path / "before") / "model.safetensors"))
    result = train_stages(model, processor, [SECOND], TRAINING, DATA, tmp_path / "run")
    assert set(load_file(result.model_folder / "model.safetensors")) == names


def _saved(model: Any, processor: Any, folder: Path) -> Path:
    from unclipped.models.checkpoint import save_model

    return save_model(model, processor, folder)


def test_a_blind_stage_without_text_is_passed_over(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm()
    before = weights(model)
    blind = DATA.model_copy(update={"blind": "removed"})
    result = train_stages(model, processor, [FIRST, SECOND], TRAINING, blind, tmp_path)
    assert "blind" in result.record["stages"][0]["passed_over"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name or "connector" in name for name in changed)


def test_standardise_is_measured_once_on_the_first_stage(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm(connector="standardise + linear")
    connector = model.model.connector
    stage = FIRST.model_copy(update={"standardise_batches": 2})
    train_stages(model, processor, [stage], TRAINING, DATA, tmp_path / "one")

    batch = MixtureExamples(Mixture(DATA, data_seed(stage, TRAINING)), processor).batch(range(4))
    with torch.no_grad():
        features = model.model.vision_tower(batch["pixel_values"], batch["image_grid_thw"])
    torch.testing.assert_close(connector.mean, features.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(connector.std, features.std(0, correction=0), atol=1e-5, rtol=1e-4)

    measured = connector.mean.clone()
    second = stage.model_copy(update={"data": DATA.model_copy(update={"seed": 9})})
    train_stages(model, processor, [second], TRAINING, DATA, tmp_path / "two")
    assert torch.equal(connector.mean, measured)


def test_length_grouping_and_bf16_and_checkpointing_train(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm()
    training = TRAINING.model_copy(update={"length_grouping": 2, "precision": "bf16", "gradient_checkpointing": True})
    result = train_stages(model, processor, [SECOND], training, DATA, tmp_path)
    assert result.record["hardware"]["precision"].startswith("bf16")
    assert model.lm_head.weight.dtype == torch.float32
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_gradient_checkpointing_changes_no_weight(make_vlm: MakeModel, tmp_path: Path) -> None:
    models = []
    for switch in (False, True):
        model, processor = make_vlm()
        training = TRAINING.model_copy(update={"gradient_checkpointing": switch})
        train_stages(model, processor, [SECOND], training, DATA, tmp_path / str(switch))
        models.append(model)
    assert_equal_weights(*models)


def test_bad_usage(make_vlm: MakeModel, tmp_path: Path) -> None:
    model, processor = make_vlm()
    with pytest.raises(UsageError, match="no stage to train"):
        train_stages(model, processor, [], TRAINING, DATA, tmp_path)
    with pytest.raises(UsageError, match="stage 'connector' has no data"):
        train_stages(model, processor, [FIRST], TRAINING, None, tmp_path)
    if not torch.cuda.is_available():
        wrong = TRAINING.model_copy(update={"device": "cuda"})
        with pytest.raises(UsageError, match=r"training\.device: cuda is not available here"):
            train_stages(model, processor, [FIRST], wrong, DATA, tmp_path)


def test_a_full_disk_is_one_clear_line(make_vlm: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make_vlm()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(UnclippedError, match=r"cannot write .*model: No space left on device"):
        train_stages(model, processor, [FIRST], TRAINING, DATA, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": {}}, "trains nothing"),
        ({"train": {"connector": 1e-3}, "auxiliary": {"ctc": 0.3}}, "ctc needs vision"),
        ({"train": {"text": 1e-3}, "warmup_steps": 4, "steps": 4}, "warmup_steps"),
        ({"train": {"text": 1e-3}, "batch_size": 5, "gradient_accumulation": 2}, "no multiple"),
        ({"train": {"text": 0.0}}, "greater than 0"),
        ({"train": {"eyes": 1e-3}}, "vision"),
        ({"train": {"text": 1e-3}, "name": "a/b"}, "pattern"),
    ],
)
def test_stages_that_cannot_be_meant(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageConfig(**({"steps": 4} | fields))


def test_progress_on_a_terminal_and_off(tmp_path: Path) -> None:
    row = {"stage": "all", "step": 5, "loss": 1.25, "samples_per_second": 43210.0, "tokens_per_second": 950.0}
    for is_terminal in (False, True):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=is_terminal, width=120)
        reporter = Reporter(tmp_path / "metrics.jsonl", console=console)
        reporter.start_stage("all", 5)
        reporter.log(row, steps=5, seconds_left=75)
        reporter.end_stage()
        assert "loss 1.2500  43.2k samples/s  950 tokens/s  1:15 left" in screen.getvalue()
    silent = Reporter(tmp_path / "other.jsonl", is_first_process=False)
    silent.log(row, steps=5, seconds_left=1)
    assert not (tmp_path / "other.jsonl").exists()
    assert (clock(59.6), clock(3725), short(4.56e6)) == ("1:00", "1:02:05", "4.56M")


def test_stages_on_one_endless_source_draw_different_samples() -> None:
    def draws(name: str) -> list[str]:
        stage = StageConfig(name=name, train={"text": 1e-3}, steps=1)
        mixture = Mixture(DATA, data_seed(stage, TRAINING))
        samples = [mixture.sample(index) for index in range(8)]
        return [f"{sample.question} {sample.metadata['transcript']}" for sample in samples]  # type: ignore[union-attr]

    assert draws("one") == draws("one")
    assert sum(one == two for one, two in zip(draws("one"), draws("two"), strict=True)) <= 2
