"""The command answers at once, loads no torch for help, and ends errors with one line and the right status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = [
    "quickstart", "import-encoder", "assemble", "pretrain", "train", "eval", "compare", "eval-encoder",
    "compare-objectives", "data", "chat", "prefill", "recipes",
]  # fmt: skip


def run(*arguments: str, module: str = "unclipped") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120)


def test_help_and_import_load_no_torch() -> None:
    code = (
        "import sys; import unclipped; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules\n"
        "from unclipped.cli.app import app\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_help_answers_quickly() -> None:
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        assert run("--help").returncode == 0
        spent.append(time.perf_counter() - start)
    # The promise is half a second on an idle machine; the bound leaves room for a loaded one.
    assert min(spent) < 1.5, spent


def test_every_command_has_help_with_examples() -> None:
    listing = run("--help").stdout
    for command in COMMANDS:
        assert command in listing
        text = run(command, "--help").stdout
        assert "Examples" in text, command
        assert "--output" in text or command in {"chat", "prefill", "recipes"}
    assert "Examples" in run("data", "stats", "--help").stdout


@pytest.mark.parametrize("command", ["quality", "bench", "search"])
def test_every_measure_of_sparse_prefill_has_help_with_examples(command: str) -> None:
    text = run("prefill", command, "--help").stdout
    assert "Examples" in text
    assert f"unclipped prefill {command}" in text
    assert "--output" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart", "--output", "x"], "unknown recipe 'quikstart'; did you mean 'quickstart'"),
        (["train", "missing.yaml", "--output", "x"], "recipe missing.yaml: no such file"),
        (["pretrain", "quickstart", "--output", "x"], "run it with 'unclipped train quickstart'"),
        (["eval", "model", "--output", "x"], "give either --recipe NAME or --data FOLDER"),
        (["train", "quickstart", "stages=3", "--output", "x"], "field 'stages'"),
        (["train"], "Missing argument"),
        (["trian"], "No such command"),
        (["train", "quickstart"], "Missing option"),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    from unclipped import __version__

    assert run("--version").stdout.strip() == f"unclipped {__version__}"


def test_arguments_that_are_no_text_are_one_line() -> None:
    for arguments in (["chat", "m", b"\xff.png", "-q", "x"], ["train", b"r\xfe.yaml", "--output", "o"], [b"\xff"]):
        done = subprocess.run([sys.executable, "-m", "unclipped", *arguments], capture_output=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: command line: an argument is no text")
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_characters_gets_escapes(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "ключ"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "unclipped", "train", f"{path}.yaml", "--output", "o"],
        capture_output=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"no such file" in done.stderr
    assert rb"\u043a" in done.stderr


@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.3, 0.6])
def test_an_early_interruption_is_quiet(seconds: float, tmp_path: Path) -> None:
    code = "import unclipped.cli.main as m, sys; print('in', flush=True); sys.argv[1:] = sys.argv[1:]; m.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "quickstart", "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.splitlines()[-1:] == ["error: interrupted"]
    assert "Traceback" not in said
