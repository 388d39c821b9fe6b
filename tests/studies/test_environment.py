"""The environment record: complete, serialisable, and free of host names and user paths."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

import pytest

from unclipped.studies.environment import command_line, environment, git_revision


def test_record_is_complete_and_serialisable() -> None:
    record = json.loads(json.dumps(environment()))
    assert set(record) == {"date", "command", "platform", "hardware", "versions", "git"}
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert record["date"].endswith("+00:00")


def test_record_names_no_host_and_no_user_path() -> None:
    text = json.dumps({key: value for key, value in environment().items() if key != "git"})
    assert str(Path.home()) + "/" not in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert f"/{getpass.getuser()}/" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/opt/x/bin/unclipped", "train", "nlvr"], "unclipped train nlvr"),
        (["/a/unclipped/__main__.py", "--output", "/home/ann/run"], "unclipped --output '…/run'"),
        (["unclipped", "--output=/home/ann/run"], "unclipped '--output=…/run'"),
        (["unclipped", "model.text=/home/ann/lm"], "unclipped 'model.text=…/lm'"),
        (["unclipped", "--vision", "llm:/home/ann/lm"], "unclipped --vision 'llm:…/lm'"),
        (["unclipped", "--data", "runs/x"], "unclipped --data runs/x"),
        (["unclipped", "--data", "generated:characters"], "unclipped --data generated:characters"),
    ],
)
def test_command_line_shows_no_absolute_path(arguments: list[str], expected: str) -> None:
    assert command_line(arguments) == expected


def test_no_revision_outside_a_checkout(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
