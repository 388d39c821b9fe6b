"""Run folders that are damaged, whose data changed, or that another process writes: one clear line, no silent change.

One finished run, one that was interrupted and one evaluation are made once; every test works on a copy of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bad_input_support import Models, Outcome, Place, expect_error, make_models, unclipped
from safetensors.torch import load_file

from support.tiny_models import tiny_image
from unclipped.objectives.answer import AnswerObjective

Run = Callable[..., Outcome]
TASKS = {"tasks": [{"name": "mine", "source": {"source": "data", "split": "val"}, "max_new_tokens": 2}]}
TASKS |= {"bootstrap_samples": 100}
STAGE = {"name": "all", "train": {"connector": 1e-3, "text": 1e-3}, "steps": 4, "batch_size": 2}
TRAINING = {"threads": 1, "device": "cpu", "log_every_steps": 1, "save_every_steps": 1}
TRAIN = ("train", "recipe.yaml", "--output")
EVAL = ("--data", "data", "--max-new-tokens", "2", "--output", "eval")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    """A folder with data, recipe and the runs `done`, `cut` (interrupted after step 3) and `eval`; and the models."""
    folder, models = tmp_path_factory.mktemp("kept"), make_models(tmp_path_factory.mktemp("models"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        place = Place(folder, models)
        rows = [{"id": f"s{i}", "image": f"{i}.png", "question": f"what {i}", "answer": str(i)} for i in range(6)]
        place.data(*rows)
        for i in range(6):
            place.image(f"data/{i}.png", 16 + i, 16)
        place.recipe("data", stages=[STAGE], training=TRAINING, evaluation=TASKS)
        assert call(patch, *TRAIN, "done") == 0
        assert call(patch, "eval", models.vlm, *EVAL) == 0
        seen, after_step = [0], AnswerObjective.after_step

        def interrupt(self: AnswerObjective) -> None:
            after_step(self)
            seen[0] += 1
            if seen[0] == 3:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(AnswerObjective, "after_step", interrupt)
        assert call(patch, *TRAIN, "cut") in (1, 130)
    assert {path.name for path in (folder / "cut" / "checkpoints").iterdir()} == {"00-all-step-00000003"}
    return folder, models


def call(patch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    from unclipped.cli.main import main

    patch.setattr(sys, "argv", ["unclipped", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.fixture
def place(tmp_path: Path, kept: tuple[Path, Models], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "copy"
    shutil.copytree(kept[0], folder)
    monkeypatch.chdir(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(folder, kept[1])
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: unclipped(monkeypatch, capsys, *arguments)


CHECKPOINT = "cut/checkpoints/00-all-step-00000003/"


def flip(path: str, at: float = 0.5) -> None:
    """Flip one bit of a file, at a share of its length."""
    content = bytearray(Path(path).read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    Path(path).write_bytes(content)


def equals_unbroken() -> None:
    """The resumed run ended with the weights and figures of the one that nobody interrupted."""
    ours, theirs = (load_file(f"{name}/model/model.safetensors") for name in ("cut", "done"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads(Path("cut/results.json").read_text()) == json.loads(Path("done/results.json").read_text())
    steps = [json.loads(line)["step"] for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert not list(Path().rglob("*.lock"))


def test_a_cut_last_line_of_metrics_is_dropped(place: Place, run: Run) -> None:
    with open("cut/metrics.jsonl", "a") as stream:
        stream.write('{"stage_index": 0, "stage": "al')
    resumed = run(*TRAIN, "cut", "--resume")
    assert resumed.status == 0, resumed
    assert "metrics.jsonl: a last line that was cut short is removed" in resumed.out
    equals_unbroken()


@pytest.mark.parametrize(
    ("file", "at"),
    [(f"{CHECKPOINT}{name}", at) for name in ("state.pt", "random-0.pt") for at in (0.02, 0.3, 0.5, 0.9)]
    + [(f"{CHECKPOINT}trainer_state.json", 0.5), (f"{CHECKPOINT}digests.json", 0.6)],
)
def test_a_flipped_bit_in_a_checkpoint_is_refused(place: Place, run: Run, file: str, at: float) -> None:
    flip(file, at)
    refused = run(*TRAIN, "cut", "--resume")
    name = "" if file.endswith("digests.json") else Path(file).name
    expect_error(refused, 1, CHECKPOINT + name, "another --output")
    assert not Path("cut/model").exists()


def test_a_changed_step_in_a_checkpoint_is_refused(place: Place, run: Run) -> None:
    path = Path(CHECKPOINT, "trainer_state.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": 1}))
    Path(CHECKPOINT, "digests.json").unlink()
    expect_error(run(*TRAIN, "cut", "--resume"), 1, "trainer_state.json", "global_step is 1, expected 3")


def test_a_checkpoint_without_digests_resumes_with_a_word(place: Place, run: Run) -> None:
    Path(CHECKPOINT, "digests.json").unlink()
    Path("cut/inputs.json").unlink()
    resumed = run(*TRAIN, "cut", "--resume")
    assert resumed.status == 0, resumed
    assert "written without digests" in resumed.out
    assert "whether they changed since it began cannot be checked" in resumed.out
    equals_unbroken()


def test_a_flipped_bit_in_the_trained_model_is_refused(place: Place, run: Run) -> None:
    Path("done/arm.json").unlink()  # trained, and interrupted in its evaluation
    flip("done/model/model.safetensors")
    expect_error(run(*TRAIN, "done", "--resume"), 1, "model.safetensors", "not what was written", "another --output")


@pytest.mark.parametrize("gone", ["cut/checkpoints", f"{CHECKPOINT}position.json", CHECKPOINT])
@pytest.mark.parametrize("knows_newest", [True, False])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    place: Place, run: Run, gone: str, knows_newest: bool
) -> None:
    if not knows_newest:
        Path("cut/checkpoints.json").unlink()
    shutil.rmtree(gone) if Path(gone).is_dir() else Path(gone).unlink()
    expect_error(run(*TRAIN, "cut", "--resume"), 1, "checkpoints", "another --output")


def test_a_run_interrupted_before_its_first_checkpoint_begins_again_with_a_word(place: Place, run: Run) -> None:
    shutil.rmtree("cut/checkpoints")
    Path("cut/checkpoints.json").unlink()
    rows = Path("cut/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("cut/metrics.jsonl").write_text(rows[0])
    resumed = run(*TRAIN, "cut", "--resume")
    assert resumed.status == 0, resumed
    assert "begins again at step 0" in resumed.out
    equals_unbroken()


def shorter() -> str:
    rows = Path("data/train.jsonl").read_text().splitlines(keepends=True)
    Path("data/train.jsonl").write_text("".join(rows[:3]))
    return "train.jsonl has 3 rows fewer"


def corrected() -> str:
    path = Path("data/train.jsonl")
    path.write_text(path.read_text().replace('"answer": "1"', '"answer": "7"'))
    return "train.jsonl has another content"


def another_image() -> str:
    tiny_image(40, 40).save("data/2.png")
    return "data/2.png has another content"


@pytest.mark.parametrize("change", [shorter, corrected, another_image])
@pytest.mark.parametrize("output", ["cut", "done"])
def test_training_is_not_resumed_on_changed_data(
    place: Place, run: Run, change: Callable[[], str], output: str
) -> None:
    says = change()
    expect_error(run(*TRAIN, output, "--resume"), 2, "--resume", says, "another --output")


@pytest.mark.parametrize("change", [shorter, corrected])
def test_an_evaluation_is_not_resumed_on_changed_data(place: Place, run: Run, change: Callable[[], str]) -> None:
    shutil.move("data/val.jsonl", "data/train.jsonl")
    says = change().replace("train", "val")
    shutil.move("data/train.jsonl", "data/val.jsonl")
    rows = Path("eval/predictions/data/predictions.jsonl").read_text().splitlines(keepends=True)
    Path("eval/predictions/data/predictions.jsonl").write_text("".join(rows[:2]))
    expect_error(run("eval", place.models.vlm, *EVAL, "--resume"), 2, "--resume", says, "another --output")


def test_an_evaluation_is_not_resumed_on_another_model(place: Place, run: Run) -> None:
    shutil.copytree(place.models.vlm, "model")
    arguments = ("eval", "model", "--data", "data", "--max-new-tokens", "2", "--output", "own")
    assert run(*arguments).status == 0
    assert run(*arguments, "--resume").status == 0
    flip("model/model.safetensors", 0.7)
    expect_error(run(*arguments, "--resume"), 2, "--resume", "model.safetensors has another content")


def test_files_of_another_split_may_change(place: Place, run: Run) -> None:
    Path("data/test.jsonl").write_text(Path("data/val.jsonl").read_text())
    Path("data/notes.txt").write_text("new")
    assert run("eval", place.models.vlm, *EVAL, "--resume").status == 0
    assert run(*TRAIN, "cut", "--resume").status == 0
    equals_unbroken()


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 2 // 3],
    "a list": lambda content: b"[1, 2]\n",
    "an object of something else": lambda content: b'{"a": 1}\n',
    "null": lambda content: b"null\n",
    "binary": lambda content: bytes(range(256)) * 4,
}
FILES = {
    "cut": [
        *(CHECKPOINT + name for name in ("state.pt", "random-0.pt", "trainer_state.json")),
        *(CHECKPOINT + name for name in ("position.json", "digests.json")),
        "cut/metrics.jsonl", "cut/recipe.yaml", "cut/inputs.json", "cut/checkpoints.json",
    ],
    "done": [
        "done/recipe.yaml", "done/training.json", "done/arm.json", "done/evaluation/results.json", "done/inputs.json",
        "done/metrics.jsonl", "done/evaluation/predictions/mine/predictions.jsonl",
    ],
    "eval": [f"eval/predictions/data/{name}" for name in ("predictions.jsonl", "task.json", "inputs.json")]
    + ["eval/recipe.yaml", "eval/inputs.json"],
}  # fmt: skip
CASES = [(output, file, damage) for output, files in FILES.items() for file in files for damage in DAMAGES]


@pytest.mark.parametrize(("output", "file", "damage"), CASES, ids=[f"{file} {damage}" for _, file, damage in CASES])
def test_a_damaged_run_file_is_named_or_mended(place: Place, run: Run, output: str, file: str, damage: str) -> None:
    path = Path(file)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = Path("eval/results.json").read_text()
    command = ("eval", place.models.vlm, *EVAL) if output == "eval" else (*TRAIN, output)
    found = run(*command, "--resume")
    if found.status != 0:
        expect_error(found, found.status, str(path.parent))
        return
    if output == "cut":  # rows from before the checkpoint are lost with their file, and that is said
        assert file == "cut/metrics.jsonl"
        assert "cut short is removed" in found.out or "holds no row from before the checkpoint" in found.out
        ours, theirs = (load_file(f"{name}/model/model.safetensors") for name in ("cut", "done"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    elif output == "eval":
        assert path.name == "predictions.jsonl"
        assert without_seconds(before) == without_seconds(Path("eval/results.json").read_text())
    else:
        assert path.name in ("training.json", "metrics.jsonl"), "read again only where the arm is not finished"


def without_seconds(text: str) -> str:
    found = json.loads(text)
    for task in found["model"].values():
        del task["seconds"]
    return json.dumps(found)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["predictions.jsonl", "task.json", "result.json"])
@pytest.mark.parametrize("command", ["compare", "rescore"])
def test_a_damaged_file_is_named_when_it_is_compared_or_scored_again(
    place: Place, run: Run, command: str, name: str, damage: str
) -> None:
    shutil.copytree("eval", "other")
    path = Path("eval/predictions/data", name)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    rescore = ("eval", place.models.vlm, "--output", "eval", "--rescore")
    found = run(*(rescore if command == "rescore" else ("compare", "other", "eval")))
    if command == "rescore" and name == "result.json":  # which scoring makes again
        assert found.status == 0, found
    else:
        expect_error(found, 1, str(path))


HOLD = """
import sys
from pathlib import Path
from unclipped.core.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started = []

    def hold(folder: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_that_another_process_writes_is_left_alone(
    place: Place, run: Run, holder: Callable[[str], subprocess.Popen[str]]
) -> None:
    commands = {
        "cut": [(*TRAIN, "cut", "--resume"), (*TRAIN, "cut")],
        "eval": [
            ("eval", place.models.vlm, *EVAL, "--resume"),
            ("eval", place.models.vlm, "--output", "eval", "--rescore"),
        ],
        "new": [
            ("quickstart", "--output", "new", "--resume"),
            ("compare-objectives", "clothing-objectives", "--output", "new", "--resume"),
            ("eval-encoder", place.models.vision, "--data", "data", "--output", "new", "--resume"),
            ("prefill", "bench", "0.6b", "--pattern", "full", "--output", "new", "--resume"),
            ("pretrain", place.pretraining("a.txt"), "--output", "new", "--resume"),
        ],
    }
    Path("new").mkdir()
    for folder, rows in commands.items():
        process = holder(folder)
        for arguments in rows:
            expect_error(
                run(*arguments), 2, f"process {process.pid} on {socket.gethostname()}", f"remove {folder}/run.lock"
            )


def test_a_lock_of_a_killed_process_is_taken_over(
    place: Place, run: Run, holder: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = holder("cut")
    process.kill()
    process.wait()
    assert Path("cut/run.lock").is_file()
    assert run(*TRAIN, "cut", "--resume").status == 0
    equals_unbroken()


def test_a_lock_of_another_machine_is_respected(place: Place, run: Run) -> None:
    place.write("cut/run.lock", json.dumps({"pid": 17, "host": "elsewhere"}))
    expect_error(run(*TRAIN, "cut", "--resume"), 2, "process 17 on elsewhere", "remove cut/run.lock")
