"""Every mistake a newcomer can make, through the real command line: one clear line, the right status, no leftovers."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bad_input.chat import ASK
from bad_input.row import sample
from bad_input_support import Models, Outcome, Place, expect_error, make_models, unclipped
from bad_input_table import COMMANDS, ROWS

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(tmp_path, models)
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: unclipped(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_gets_one_clear_line(name: str, place: Place, run: Run) -> None:
    row = ROWS[name]
    arguments = row.arguments(place)
    outcome = run(*arguments)
    expect_error(outcome, row.status, *row.says)
    assert row.output_stays or not (place.folder / "out").exists(), "what was left would block the corrected command"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (1, 400), (400, 1)])
def test_images_smaller_than_a_patch_and_strips_work(place: Place, run: Run, height: int, width: int) -> None:
    done = run("chat", place.models.vlm, place.image("small.png", height, width), *ASK)
    assert (done.status, done.err) == (0, "")


def test_a_language_model_without_padding_and_chat_template_works(place: Place, run: Run) -> None:
    done = run("assemble", "--vision", place.models.vision, "--text", place.models.bare, "--output", "model")
    assert done.status == 0, done
    assert "padding <|endoftext|>" in done.out
    assert "chat template: default" in done.out
    trained = run("train", place.recipe(model={"checkpoint": "model"}), "--output", "out")
    assert trained.status == 0, trained
    assert run("chat", "out/model", place.image("a.png"), *ASK).status == 0


def test_a_declared_baseline_works(place: Place, run: Run) -> None:
    models = place.models
    done = run("assemble", "--vision", models.clip, "--text", models.text, "--baseline", "--output", "model")
    assert done.status == 0, done
    assert "contrastive" in done.out
    recipe = place.recipe(model={"vision": str(models.clip), "text": str(models.text), "baseline": True})
    assert run("train", recipe, "--output", "out").status == 0


def test_names_with_spaces_and_other_letters_work(place: Place, run: Run) -> None:
    folder = "Übung #1: größer"
    models = place.models
    assert run("assemble", "--vision", models.vision, "--text", models.text, "--output", f"{folder}/m o").status == 0
    data = place.data(sample(image="图 1.png"), name=f"{folder}/データ")
    place.image(f"{data}/图 1.png")
    recipe = place.recipe(data, name=f"{folder}/my recipe.yaml", model={"checkpoint": f"{folder}/m o"})
    assert run("train", recipe, "--output", f"{folder}/out put").status == 0
    assert run("chat", f"{folder}/out put/model", f"{data}/图 1.png", *ASK).status == 0
    assert run("eval", f"{folder}/out put/model", "--data", data, "--output", f"{folder}/eval").status == 0


def test_the_corrected_command_starts(place: Place, run: Run) -> None:
    data = place.data(sample(image="late.png"))
    recipe = place.recipe(data)
    (place.folder / "out").mkdir()
    expect_error(run("train", recipe, "--output", "out"), 1, "late.png")
    assert list((place.folder / "out").iterdir()) == []  # it was there before
    place.image(f"{data}/late.png")
    assert run("train", recipe, "--output", "out").status == 0
    expect_error(run("train", recipe, "--output", "out"), 2, "not empty", "--resume")
    assert run("train", recipe, "--output", "out", "--resume").status == 0  # finished: nothing is done again
    expect_error(
        run("train", recipe, "training.seed=7", "--output", "out", "--resume"), 2, "out/recipe.yaml differs", "--output"
    )


def test_later_parts_are_looked_at_before_the_first_step(place: Place, run: Run) -> None:
    stage = {"name": "later", "train": {"text": 1e-3}, "steps": 1, "data": {"sources": [{"source": "nowhere"}]}}
    first = {"name": "first", "train": {"text": 1e-3}, "steps": 10**6}
    expect_error(run("train", place.recipe(stages=[first, stage]), "--output", "out"), 1, "nowhere")
    task = {"name": "t", "source": {"source": "missing"}}
    recipe = place.recipe(stages=[first], evaluation={"tasks": [task]})
    expect_error(run("train", recipe, "--output", "out"), 1, "missing")
    recipe = place.recipe(stages=[first], held_out_text=[{"source": "gone.txt"}])
    expect_error(run("train", recipe, "--output", "out"), 1, "gone.txt")
    assert not (place.folder / "out").exists()


@pytest.mark.parametrize("target", ["empty", "dangling"])
def test_an_output_that_is_a_link_is_written_through(place: Place, run: Run, target: str) -> None:
    if target == "empty":
        (place.folder / "real").mkdir()
    (place.folder / "out").symlink_to("real")
    done = run(*COMMANDS["assemble"](place))
    assert done.status == 0, done
    assert (place.folder / "out").is_symlink()
    assert (place.folder / "real" / "model.safetensors").is_file()
    expect_error(run(*COMMANDS["assemble"](place)), 2, "--output out", "not empty")


def test_a_failure_behind_an_output_that_is_a_link_is_what_is_said(place: Place, run: Run) -> None:
    (place.folder / "real").mkdir()
    (place.folder / "out").symlink_to("real")
    expect_error(run("assemble", "--vision", "./gone", "--text", place.models.text, "--output", "out"), 1, "./gone")
    assert (place.folder / "out").is_symlink()
    assert list((place.folder / "real").iterdir()) == []


def test_rows_longer_than_the_positions_are_named(place: Place, run: Run) -> None:
    long = place.data(sample(question="two " * 600))
    expect_error(run("train", place.recipe(long), "--output", "out"), 1, "sample s1", "512 positions", "max_length")
    place.write("long.txt", "one two three " * 2000)
    held = place.recipe(held_out_text=[{"source": "long.txt"}], held_out_length=600, held_out_blocks=1)
    expect_error(run("train", held, "--output", "out"), 2, "held_out_length", "600", "512 positions")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    recipe = place.pretraining(place.data(), shape=shape | {"max_position_embeddings": 8})
    expect_error(run("pretrain", recipe, "--output", "out"), 2, "block_length", "16", "8 positions")


def test_an_item_longer_than_the_positions_is_counted_not_fatal(place: Place, run: Run) -> None:
    data = place.data(sample(), sample(id="long", question="two " * 600), sample(id="s3"))
    given = ["eval", place.models.vlm, "--data", data, "--max-new-tokens", "2", "--output", "out"]
    done = run(*given, "--blind")
    assert done.status == 0, done
    assert "1 of 3 items were not asked" in done.out
    results = json.loads((place.folder / "out/results.json").read_text())
    for arm in ("model", "blind"):
        (result,) = results[arm].values()
        assert (result["num_unanswered"], result["overall"]["count"]) == (1, 3)
    (path,) = (place.folder / "out/predictions").glob("*/predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["prediction"], row["score"], bool(row["unanswered"])) for row in rows if row["id"] == "long"] == [
        ("", 0.0, True)
    ]
    assert run(*given[:1], place.models.vlm, "--output", "out", "--rescore").status == 0


def test_a_row_that_cannot_be_scored_is_found_before_the_model_works(place: Place, run: Run) -> None:
    data = place.data(*[sample(id=f"s{number}") for number in range(3)], sample(id="last", answer=None))
    expect_error(run("eval", place.models.vlm, "--data", data, "--output", "out"), 1, "sample last", "no gold answer")
    assert not list(place.folder.glob("out/predictions/*/predictions.jsonl"))


def test_rescore_with_another_scorer_uses_it(place: Place, run: Run) -> None:
    data = place.data()
    assert run("eval", place.models.vlm, "--data", data, "--max-new-tokens", "2", "--output", "out").status == 0
    done = run("eval", place.models.vlm, "--rescore", "--scorer", "character_error_rate", "--output", "out")
    assert done.status == 0, done
    found = json.loads((place.folder / "out" / "results.json").read_text())["model"]["data"]
    assert (found["scorer"], found["metric"]) == ("character_error_rate", "character_error_rate")
    assert run("eval", place.models.vlm, "--rescore", "--output", "out").status == 0
    found = json.loads((place.folder / "out" / "results.json").read_text())["model"]["data"]
    assert found["scorer"] == "exact_match"  # the task's own
    unknown = run("eval", place.models.vlm, "--rescore", "--scorer", "exakt", "--output", "out")
    expect_error(unknown, 2, "'exakt'", "exact_match")


def test_resumed_evaluation_of_another_model(place: Place, run: Run) -> None:
    data = place.data()
    assert run("eval", place.models.vlm, "--data", data, "--output", "out").status == 0
    changed = place.tampered(place.models.vlm, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    expect_error(run("eval", changed, "--data", data, "--output", "out", "--resume"), 2, "another model", "--output")


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process the signal of Ctrl-C after so many steps of training."""
    from unclipped.objectives.base import Objective

    def arrange(steps: int) -> None:
        seen: list[int] = []

        def after_step(self: Objective) -> None:
            seen.append(1)
            if len(seen) == steps:
                os.kill(os.getpid(), signal.SIGINT)

        for kind in (Objective, *Objective.__subclasses__()):
            monkeypatch.setattr(kind, "after_step", after_step)

    return arrange


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_ctrl_c_saves_and_says_how_to_resume(
    place: Place, run: Run, interrupt: Callable[[int], None], command: str
) -> None:
    arguments = COMMANDS[command](place)
    interrupt(1)
    expect_error(run(*arguments), 130, "interrupted in stage", "after step 1 of 2", "saved out/checkpoints", "--resume")
    interrupt(0)
    resumed = run(*arguments, "--resume")
    assert resumed.status == 0, resumed
    assert "resuming from" in resumed.out
    assert (place.folder / "out" / "model" / "model.safetensors").is_file()


def test_ctrl_c_before_training_leaves_nothing(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import unclipped.models.assemble as assembly

    monkeypatch.setattr(assembly, "load_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    expect_error(run(*COMMANDS["train"](place)), 130, "interrupted")
    assert not (place.folder / "out").exists()


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 600, 20_000])
@pytest.mark.parametrize("command", ["assemble", "train", "pretrain", "eval"])
def test_a_full_disk(place: Place, run: Run, small_disk: Callable[[int], None], command: str, size: int) -> None:
    arguments = COMMANDS[command](place)
    small_disk(size)
    outcome = run(*arguments)
    small_disk(resource.RLIM_INFINITY)
    if (command, size) == ("eval", 20_000):
        assert outcome.status == 0
        return
    expect_error(outcome, 1, "out", "File too large", "free space", "another")
    assert not list(place.folder.rglob("*.safetensors")), "half a model"
    assert not list(place.folder.rglob(".*")), "temporary files"


def test_debug_shows_the_traceback(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from unclipped.core.errors import UsageError

    monkeypatch.setenv("UNCLIPPED_DEBUG", "")
    with pytest.raises(UsageError, match="unknown recipe"):
        run("--debug", "recipes", "nosuch")


def test_a_reader_that_goes_away(place: Place) -> None:
    program = [sys.executable, "-m", "unclipped"]
    for arguments in (["recipes", "quickstart"], COMMANDS["train"](place)):
        command = " ".join(map(str, [*program, *arguments]))
        done = subprocess.run(["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0
        assert done.stdout.count("\n") == 1
        assert done.stderr == ""


def test_no_arguments_is_help(run: Run) -> None:
    done = run()
    assert (done.status, done.err) == (0, "")
    assert "quickstart" in done.out
