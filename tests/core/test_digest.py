"""Digests of groups of files: what is read of large ones, and what a change is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from unclipped.core import digest
from unclipped.core.digest import changes_between, describe_files


def files(folder: Path, count: int, size: int) -> dict[str, Path]:
    for number in range(count):
        (folder / f"{number}.bin").write_bytes(bytes([number]) * size)
    return {path.name: path for path in folder.iterdir()}


def test_a_large_group_is_read_by_blocks_and_every_size_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "READ_WHOLE", 1 << 19)
    group = files(tmp_path, 3, 1 << 20)
    before = describe_files(group)
    assert (before["read"], before["files"], before["bytes"]) == ("blocks", 3, 3 << 20)
    assert changes_between(before, describe_files(group)) == []
    content = bytearray(group["1.bin"].read_bytes())
    content[0] ^= 1  # in the first block
    group["1.bin"].write_bytes(content)
    assert changes_between(before, describe_files(group)) == ["1.bin has another content"]
    group["2.bin"].write_bytes(group["2.bin"].read_bytes() + b"x")
    group["0.bin"].unlink()
    found = changes_between(before, describe_files(group))
    assert found == ["0.bin is gone", "1.bin has another content", "2.bin has another content"]


def test_of_very_many_files_counts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_NAMED", 2)
    before = describe_files(files(tmp_path, 3, 10))
    assert "each" not in before
    assert changes_between(before, describe_files(files(tmp_path, 4, 10))) == [
        "3 files of 30 bytes then, 4 of 40 bytes now"
    ]
