"""The pages on adding an encoder and a connector, followed to the letter in a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import ROOT, apply_diff, blocks, commands

from support.tiny_models import tiny_lm

pytestmark = pytest.mark.slow

PAGES = [ROOT / "docs" / "add-an-encoder.md", ROOT / "docs" / "add-a-connector.md"]


def test_an_encoder_and_a_connector_can_be_added_as_the_pages_say(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignored)
    for folder in ("encoders", "connectors", "support"):
        shutil.copytree(ROOT / "tests" / folder, tmp_path / "tests" / folder, ignore=ignored)
    script = ["import sys, pytest"]
    for page in PAGES:
        for block in blocks(page):
            path = tmp_path / block.file if block.file else None
            if block.language == "diff":
                assert path is not None
                apply_diff(path, block.text)
            elif block.language == "python" and path is not None:
                before = path.read_text() + "\n\n" if path.exists() else ""
                path.write_text(before + block.text)
            elif block.language == "python":
                script.append(block.text)
    for command in [command for page in PAGES for command in commands(page)]:
        program, _, module, *options = command.split()
        assert (program, module) == ("python", "pytest"), command
        script.append(f"code = pytest.main({['-q', '-p', 'no:cacheprovider', *options]!r})\nif code: sys.exit(code)")
    tiny_lm(tmp_path / "my-lm")
    (tmp_path / "follow.py").write_text("\n".join(script))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "src"), str(tmp_path / "tests")])}
    done = subprocess.run(
        [sys.executable, "follow.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "msn-model" / "config.json").is_file()
    assert done.stdout.count(" passed") == 2
