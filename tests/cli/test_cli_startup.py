"""The command answers at once, loads no torch for help, and ends errors with one line and the right status."""

from __future__ import annotations

import subprocess
import sys
import time

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
        "from unclipped.cli.main import app\n"
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
