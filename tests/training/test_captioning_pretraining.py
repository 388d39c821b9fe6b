"""Captioning end to end: which captions are predicted all at once, the run, resume, several processes, bad input."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from captioning_worker import config
from pair_support import COLOURS, VIT, write_pairs
from torchrun_support import rows, two_processes, weights

from support.tiny_models import tiny_lm
from unclipped.core.errors import CheckpointError, DataError, UsageError
from unclipped.data.config import DataConfig, SourceConfig
from unclipped.encoders.build import load_encoder
from unclipped.models.assemble import assemble
from unclipped.models.config import ModelConfig
from unclipped.objectives.caption_side import load_caption_decoder
from unclipped.objectives.captioning import CaptioningObjective
from unclipped.recipes.schema import PretrainRecipe
from unclipped.recipes.validation import load_recipe
from unclipped.training.captioning_pretraining import captioning_job
from unclipped.training.interrupt import TrainingInterrupted
from unclipped.training.pretrain import pretrain

WORKER = Path(__file__).with_name("captioning_worker.py")
SETTINGS: dict[str, dict[str, Any]] = {"whole": {}, "cut": {"gradient_accumulation": 2}}
WRAPPERS = {"alone": "CaptioningObjective", "ddp": "DistributedDataParallel", "fsdp2": "FSDPCaptioningObjective"}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def test_which_captions_are_predicted_at_once_depends_on_the_seed_and_the_draw_alone(colours: Path) -> None:
    given = config(colours)
    examples = captioning_job(given).make_examples(given.stage())
    several, single = examples.batch([4, 5, 6]), examples.batch([5])
    assert bool(several["parallel"][1]) == bool(single["parallel"][0])
    assert several["sample_ids"][1] == single["sample_ids"][0]
    first, again = (examples.batch(range(400))["parallel"] for _ in range(2))
    assert torch.equal(first, again)
    assert 0.65 < float(first.double().mean()) < 0.85  # 0.75, four standard deviations
    assert not torch.equal(first[:12], first[12:24])  # the same images in the next epoch
    other = config(colours, training={"seed": 1})
    assert not torch.equal(captioning_job(other).make_examples(other.stage()).batch(range(400))["parallel"], first)
    for share in (0.0, 1.0):
        edge = config(colours, captioning={"parallel_share": share})
        chosen = captioning_job(edge).make_examples(edge.stage()).batch(range(20))["parallel"]
        assert chosen.tolist() == [bool(share)] * 20
    assert all(length > 4 for length in examples.lengths([0, 1]))


def test_a_run_writes_an_encoder_that_loads_without_being_a_baseline(colours: Path, tmp_path: Path) -> None:
    result = pretrain(config(colours), tmp_path / "run")
    assert result.record["finished"]
    encoder, _ = load_encoder(str(result.model_folder))
    assert encoder.spec.objective == "captioning"
    assert not encoder.spec.needs_baseline_flag
    assert set(rows(tmp_path / "run")[0]["health"]) == {"rank", "spread", "images"}
    tiny_lm(text := tmp_path / "lm")
    _, _, report = assemble(ModelConfig(vision=str(result.model_folder), text=str(text)))
    assert report.objective == "captioning"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_captions_are_learned_in_both_modes(share: float, colours: Path, tmp_path: Path) -> None:
    """The colour is in the image alone; whoever does not look at it loses at least log(4) a caption."""
    captioning = {"parallel_share": share, "width": 32}
    pretrain(config(colours, steps=120, batch_size=12, learning_rate=2e-2, captioning=captioning), tmp_path / "run")
    losses, most_tokens = [row["loss"] for row in rows(tmp_path / "run")], len("a green thing") + 1
    assert losses[0] == pytest.approx(math.log(280), rel=0.02)  # nothing is known yet
    assert losses[-1] < math.log(len(COLOURS)) / most_tokens
    scorer = load_caption_decoder(tmp_path / "run" / "model")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (scorer.rule.mean, scorer.rule.std))
    plain = torch.stack([torch.tensor(colour).view(3, 1, 1).expand(3, 16, 16) / 255 for colour in COLOURS.values()])
    names = [f"a {name} thing" for name in COLOURS]
    scores = scorer.score((plain - mean) / std, names, is_parallel=bool(share))
    assert scores.argmax(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("is_parallel", [False, True])
def test_scores_are_the_losses_of_the_captions(is_parallel: bool, colours: Path, tmp_path: Path) -> None:
    folder = pretrain(config(colours, learning_rate=2e-2), tmp_path / "run").model_folder
    scorer, pixels = load_caption_decoder(folder), torch.randn(2, 3, 16, 16)
    captions = ["a red thing", "blue", "a thing"]
    found = scorer.score(pixels, captions, is_parallel=is_parallel)
    objective = CaptioningObjective(scorer.model)
    for image in range(2):
        for number, caption in enumerate(captions):  # alone, so without padding
            ids, mask = scorer.captions.batch([scorer.captions.row(caption, "caption")])
            loss = objective(
                pixel_values=pixels[image : image + 1], input_ids=ids, attention_mask=mask,
                parallel=torch.tensor([is_parallel]),
            )["loss"]  # fmt: skip
            assert float(found[image, number]) == pytest.approx(-float(loss.detach()) * int(mask.sum()), rel=1e-4)
    assert scorer.score(pixels[:0], captions).shape == (0, 3)
    with pytest.raises(UsageError, match="captions: none to score"):
        scorer.score(pixels, [])
    with pytest.raises(DataError, match="caption 1: the caption is empty"):
        scorer.score(pixels, ["a", " "])


def test_a_decoder_that_does_not_fit_is_refused(colours: Path, tmp_path: Path) -> None:
    folder = pretrain(config(colours, steps=1), tmp_path / "run").model_folder
    with pytest.raises(CheckpointError, match=r"no caption_decoder/caption_decoder\.json in this folder.*captioning"):
        load_caption_decoder(tmp_path)
    description = folder / "caption_decoder" / "caption_decoder.json"
    fields = json.loads(description.read_text())
    for change, message in (
        ({"captioning": fields["captioning"] | {"layers": 2}}, r"missing \d+: decoder\.blocks\.1"),
        ({"captioning": {"wdith": 3}}, r"not the description of a caption decoder"),
    ):
        description.write_text(json.dumps(fields | change))
        with pytest.raises(CheckpointError, match=message):
            load_caption_decoder(folder)


def test_an_interrupted_run_resumes_to_equal_files(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, steps = config(colours), []
    whole = pretrain(given, tmp_path / "whole")

    def stop_in_step_three(self: Any) -> None:
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CaptioningObjective, "after_step", stop_in_step_three)
    with pytest.raises(TrainingInterrupted, match="step 3 of 5"):
        pretrain(given, tmp_path / "parts")
    monkeypatch.undo()
    parts = pretrain(given, tmp_path / "parts", resume=True)
    for name in ("model.safetensors", "caption_decoder/caption_decoder.safetensors"):
        assert (whole.model_folder / name).read_bytes() == (parts.model_folder / name).read_bytes()
    assert [row["loss"] for row in rows(tmp_path / "parts")] == [row["loss"] for row in rows(tmp_path / "whole")]


@pytest.fixture(scope="module")
def runs(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of run folders: every setting alone in this process, and by two processes under DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, options in SETTINGS.items():
        pretrain(config(colours, **options), folder / f"{name}-alone")
    wanted = [
        options | {"training": {"parallel": parallel}, "name": f"{name}-{parallel}"}
        for name, options in SETTINGS.items()
        for parallel in ("ddp", "fsdp2")
    ]
    two_processes(WORKER, wanted, colours, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_processes_equal_one(runs: Path, name: str, parallel: str) -> None:
    alone, together = runs / f"{name}-alone", runs / f"{name}-{parallel}"
    for how, folder in (("alone", alone), (parallel, together)):
        record = json.loads((folder / "training.json").read_text())
        assert record["stages"][0]["wrapped_as"] == WRAPPERS[how]
    for mine, theirs in zip(rows(together), rows(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    expected = weights(alone)
    for tensor, value in weights(together).items():
        torch.testing.assert_close(value, expected[tensor], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": None}, r"pair-2.*exactly one assistant turn.*found 0"),
        ({"answer": "  "}, r"pair-2.*exactly one assistant turn with text.*found 0"),
        ({"image": None}, r"pair-2.*exactly one image.*found 0"),
        ({"answer": "a thing " * 20}, r"sample pair-2: the caption has \d+ tokens, more than pairs\.context_length 12"),
    ],
    ids=["no caption", "empty caption", "no image", "long caption"],
)
def test_bad_pairs_are_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pretrain(config(write_pairs(tmp_path / "pairs", **changed)), tmp_path / "run")


def test_images_without_captions_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "images", rows=3)
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"id": f"i-{n}", "image": f"{n}.png"}) for n in range(3)))
    with pytest.raises(DataError, match=r"train\.jsonl|i-\d"):
        pretrain(config(folder), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 20}, r"image_size 20 is no multiple of patch_size 8"),
        ({"shape": VIT | {"model_type": "vit_mae"}}, r"shape\.model_type: no encoder 'vit_mae' to train"),
        ({"data": {"share_image": True}}, r"data\.share_image: captioning learns from single images with their"),
        ({"data": {"blind": "blank"}}, r"data\.blind: captioning learns from single images with their captions"),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str, colours: Path, tmp_path: Path) -> None:
    if isinstance(data := fields.get("data"), dict):
        fields = fields | {"data": DataConfig(sources=(SourceConfig(source=str(colours)),), **data)}
    with pytest.raises(UsageError, match=message):
        pretrain(config(colours, **fields), tmp_path / "run")


def test_the_recipe_gives_the_shape_of_the_other_arms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNCLIPPED_DATA", str(tmp_path))
    own, other = (load_recipe(f"clothing-{name}", PretrainRecipe, []) for name in ("captioning", "contrastive"))
    assert own.objective == "captioning"
    for field in ("shape", "steps", "batch_size", "learning_rate", "warmup_steps", "data"):
        assert getattr(own, field) == getattr(other, field)
